"""What the sampler does, in NumPy, one row at a time and in float64."""

import numpy as np

from sharded_llama.sampling.entropy_settings import N_SETTINGS, pack_settings
from sharded_llama.sampling.params import MAX_BIAS
from sharded_llama.sampling.slots import SlotSampling


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
        z[np.setdiff1d(np.arange(len(z)), list(allowed))] = -np.inf
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


def drawn(z, params, noise):
    """The token that noise (V,) draws; temperature 0: the most likely one."""
    if params.temperature == 0:
        return int(np.argmax(z))
    scaled = np.where(kept(z, params), (z - z.max()) / params.temperature, -np.inf)
    return int(np.argmax(scaled + noise))


def mask_words(allowed, vocab):
    """Bit t % 32 of word t // 32 is set for the tokens that are allowed; None: all bits."""
    words = np.zeros(-(-vocab // 32), np.uint32)
    for token in range(32 * len(words)) if allowed is None else allowed:
        words[token // 32] |= np.uint32(1 << (token % 32))
    return words


def slot_arrays(settings, vocab, width):
    """What is kept of slots: of dictionaries with any of `params`, `prompt`, `generated` and `allowed`.

    Counts are `width` wide: 1 for a token of the prompt and 2 for each time that it was generated.
    """
    n = len(settings)
    slots = SlotSampling(
        counts_SV=np.zeros((n, width), np.int32),
        allowed_SW=np.stack([mask_words(s.get("allowed"), vocab) for s in settings]),
        bias_ids_SB=np.full((n, MAX_BIAS), -1, np.int32),
        bias_SB=np.zeros((n, MAX_BIAS), np.float32),
        entropy_SE=np.zeros((n, N_SETTINGS), np.float32),
    )
    for i, setting in enumerate(settings):
        for token in set(setting.get("prompt", ())):
            slots.counts_SV[i, token] += 1
        for token in setting.get("generated", ()):
            slots.counts_SV[i, token] += 2
        params = setting.get("params")
        for b, (token, bias) in enumerate((params.logit_bias or {}).items() if params else ()):
            slots.bias_ids_SB[i, b], slots.bias_SB[i, b] = token, bias
        if params and params.entropy:
            slots.entropy_SE[i] = pack_settings(params.entropy)
    return slots
