"""What people do in place of label smoothing, as backends of the trainer's loss, which take
`--label-smoothing` for their weight β:

    python -m benchmarks.paper.penalties --implementation maxsup|confidence-penalty FLAGS

is `python -m train FLAGS` with these two. With z the logits of a token, p = softmax(z), z̄ their
mean, y its label and H = −Σ p log p:

    label smoothing      L = lse − z_y + β·(z_y − z̄)     dL/dz_k = p_k − [k=y] + β·([k=y] − 1/V)
    maxsup               L = lse − z_y + β·(z_max − z̄)   dL/dz_k = p_k − [k=y] + β·([k=max] − 1/V)
    confidence-penalty   L = lse − z_y − β·H             dL/dz_k = p_k − [k=y] + β·p_k·(log p_k + H)

They are here to be judged and not to be fast: all logits are made, several arrays of N×V float32,
which JAX differentiates. In kernels maxsup would be one more gather of the head, of the likeliest
token, which the forward pass knows. The confidence penalty would weigh each p of the backward pass
by log p and by the token's H, a statistic that the forward pass can return.
"""

MODULES = {
    "maxsup": "benchmarks.paper.penalties.maxsup",
    "confidence-penalty": "benchmarks.paper.penalties.confidence",
}
"""As `lsce.backends.MODULES` names its own."""
