"""The kernels without the engine: rotary embedding, SwiGLU and pooling of packed texts.

    python examples/kernels.py

The ops run on the device of their tensors: Triton kernels on CUDA, PyTorch on a CPU.
"""

import torch

from unpadded_kernels import activation, matryoshka, mean_pool, rotary_, rotary_cos_sin

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
lengths = [3, 7, 5]  # three texts, packed without padding
cu_seqlens = torch.tensor([0, 3, 10, 15], dtype=torch.int32, device=device)
positions = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths]).to(device)
heads, head_dim = 12, 64

# Rotary embedding of q and k, in place.
qkv = torch.randn(15, 3, heads, head_dim, device=device)
value = qkv[:, 2].clone()
inv_freq = 10000.0 ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
rotary_(qkv, rotary_cos_sin(positions, inv_freq[None], cu_seqlens))
assert torch.equal(qkv[:, 2], value)  # v is not rotated

# SwiGLU: silu(gate) * up.
x = torch.randn(15, 2 * 3072, device=device)
gate, up = x.chunk(2, dim=-1)
torch.testing.assert_close(activation(x, "swiglu"), torch.nn.functional.silu(gate) * up)

# Mean of each text's rows, then L2 normalization.
hidden = torch.randn(15, 768, device=device)
vectors = matryoshka(mean_pool(hidden, cu_seqlens), layer_norm=False, dimensions=768, normalize=True)
expected = torch.stack([rows.mean(dim=0) for rows in hidden.split(lengths)])
torch.testing.assert_close(vectors, torch.nn.functional.normalize(expected, dim=1))
print(vectors.shape, device)
