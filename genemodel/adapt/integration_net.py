"""Where the recipe of an integration stood before encoder and head were two modules.

Scripts of users import it from here.
"""

from genemodel.integration.head import IntegrationSettings

__all__ = ["IntegrationSettings"]
