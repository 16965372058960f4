"""Where the recipe of an integration stood before encoder and head were two modules.

Scripts of users import it from here.
"""

from genemodel.adapt.integration_head import IntegrationSettings

__all__ = ["IntegrationSettings"]
