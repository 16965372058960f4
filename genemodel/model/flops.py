"""Arithmetic of a training step, for honest utilisation figures.

A multiply-add counts as two operations. Only matrix products and attention count: everything else
is below a few per cent at any size we build.
"""

import numpy as np

from genemodel.model.settings import ModelSettings

# Dense bf16 peak without sparsity, operations per second, by the vendors' data sheets. The key is
# looked for in torch.cuda.get_device_name().
PEAK_BF16 = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
}


def encoder_flops(settings: ModelSettings, lengths_C: np.ndarray) -> int:
    """Operations of one forward pass through the blocks over cells of these lengths.

    Parameters
    ----------
    settings
        Shape of the model.
    lengths_C
        Tokens of every cell.

    Notes
    -----
    Per block: 2·n·(4·D² + m·D·F) for the matrices (m = 3 when gated, else 2) and 4·n²·D for the
    scores and the weighted sum.
    """
    n = np.asarray(lengths_C, np.int64)
    matrices = 3 if settings.activation == "swiglu" else 2
    dense = 2 * int(n.sum()) * (4 * settings.width**2 + matrices * settings.width * settings.ffn)
    attention = 4 * int((n**2).sum()) * settings.width
    return settings.layers * (dense + attention)


def gene_head_flops(settings: ModelSettings, n_masked: int, n_tokens: int) -> int:
    """Operations of the gene head over ``n_masked`` rows: one D×D and one D×V product each."""
    return 2 * n_masked * (settings.width**2 + settings.width * n_tokens)


def training_flops(forward: int) -> int:
    """Forward plus backward: the backward pass has two products for every one."""
    return 3 * forward


def device_peak(name: str) -> float | None:
    """Peak bf16 operations per second of a device, or None where it is not known."""
    for key in sorted(PEAK_BF16, key=len, reverse=True):
        if key in name:
            return PEAK_BF16[key]
    return None
