"""The last block for opening tokens alone gives the vectors that the whole pass gives."""

import pytest
import torch

from genemodel.model.opening import encode_opening


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("bias", [False, True])
def test_opening_tokens_alone(pack_random, away, norm, bias):
    model, _ = away(norm=norm, bias=bias, position="rank")
    batch = pack_random()
    model.eval()
    with torch.inference_mode():
        whole_CD = model(batch).cell_CD
        found_CD = encode_opening(model, batch)
    n = batch.n_cells
    assert found_CD.shape == whole_CD.shape
    torch.testing.assert_close(found_CD[:n], whole_CD[:n], rtol=1e-5, atol=1e-6)
    assert bool(torch.isfinite(found_CD).all())
