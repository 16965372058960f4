import numpy as np, pytest, torch
import genemodel as gm
from genemodel import IntegrationSettings, DecoderSettings
SHORT = IntegrationSettings(steps=6, passes=0, hidden=16, rank=8, latent=6, batch_cells=32)
QUICK = DecoderSettings(hidden=16, latent=4, epochs=1, batch_cells=32)

@pytest.fixture(scope="module")
def human():
    return gm.synthetic(160, species=("human",), n_batches=2, n_genes=600, genes_per_cell=80, seed=4)["human"]

@pytest.mark.parametrize("tune", ["frozen","lora","last","full"])
@pytest.mark.parametrize("task", ["integrate","impute"])
def test_the_loss_reaches_what_learns(random_bundle, human, tune, task, tmp_path):
    adata = human.copy()
    before = {k: v.clone() for k, v in random_bundle.model.state_dict().items()}
    if task == "integrate":
        m = gm.integrate(adata, batch_key="batch", model=random_bundle, backbone=tune, settings=SHORT, device="cpu")
    else:
        m = gm.impute(adata, random_bundle, batch_key="batch", backbone=tune, settings=QUICK, device="cpu")
    after = m.bundle.model.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k].cpu())}
    print(tune, task, sorted(changed)[:4], len(changed))
    assert all(torch.equal(v, random_bundle.model.state_dict()[k]) for k, v in before.items())
    assert bool(changed) == (tune != "frozen")
    m.save(tmp_path / "m")
    back = gm.load(tmp_path / "m", device="cpu")
    if task == "integrate":
        np.testing.assert_allclose(back.encode(adata), m.encode(adata), rtol=1e-4, atol=1e-5)
    else:
        other = human.copy()
        gm.impute(other, back)
        np.testing.assert_allclose(other.layers["imputed"], adata.layers["imputed"], rtol=1e-3, atol=1e-4)
