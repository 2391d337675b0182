"""What the sampler does, in NumPy, one row at a time and in float64."""

import numpy as np


def processed(logits, params, prompt=(), generated=(), allowed=None):
    """Bias, then repetition, frequency and presence penalty, then what is not allowed."""
    z = np.array(logits, np.float64)
    for token, bias in (params.logit_bias or {}).items():
        z[token] += bias
    for token in set(prompt) | set(generated):
        z[token] = z[token] / params.repetition_penalty if z[token] > 0 else z[token] * params.repetition_penalty
    for token in set(generated):
        times = list(generated).count(token)
        z[token] -= params.frequency_penalty * times + params.presence_penalty
    if allowed is not None:
        z[[t for t in range(len(z)) if t not in set(allowed)]] = -np.inf
    return z


def kept(z, params):
    """Which tokens min_p, top_k and top_p keep, each of the renormalised result of the one before."""
    probs = np.exp((z - z.max()) / params.temperature)
    order = np.lexsort((np.arange(len(z)), -z))
    probs = probs[order]
    n = int(np.sum((probs >= params.min_p * probs[0]) & (z[order] > -np.inf)))
    if params.top_k > 0:
        n = min(n, params.top_k)
    if params.top_p < 1:
        mass_before = np.cumsum(probs[:n]) - probs[:n]
        n = int(np.sum(mass_before < params.top_p * probs[:n].sum()))
    found = np.zeros(len(z), bool)
    found[order[:n]] = True
    return found


def distribution(z, params):
    """Probabilities that tokens are drawn with."""
    probs = np.where(kept(z, params), np.exp((z - z.max()) / params.temperature), 0)
    return probs / probs.sum()


def log_softmax(logits):
    exact = np.asarray(logits, np.float64)
    peak = exact.max(-1, keepdims=True)
    return exact - peak - np.log(np.exp(exact - peak).sum(-1, keepdims=True))
