"""The entropy sampler in NumPy and float64: one row at a time, as the formulas are written down."""

import math
from dataclasses import dataclass

import numpy as np

from sharded_llama.sampling.entropy_settings import EntropySettings


@dataclass
class Decision:
    """What is done for one token."""

    strategy: str
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    candidates: int = 1
    forced: int = -1


def entropy(probs):
    """Bits, over the last axis; 0 log 0 = 0."""
    probs = np.float64(probs)
    return -np.sum(probs * np.log2(probs, where=probs > 0, out=np.zeros_like(probs)), axis=-1)


def softmax(x):
    x = np.float64(x)
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def logit_metrics(logits):
    """H and V of one row of the true vocabulary."""
    probs = softmax(logits)
    h = entropy(probs)
    kept = probs > 0
    return h, np.sum(probs[kept] * (np.log2(probs[kept]) + h) ** 2)


def attention_metrics(scores):
    """aH, aV, agree and inter of one row from its scores (heads, live positions)."""
    scores = np.float64(scores)
    if scores.shape[1] == 0:
        return np.zeros(4)
    probs = softmax(scores)
    of_heads = entropy(probs)
    agree = np.mean(np.abs(probs - probs.mean(axis=0)))
    return np.array([of_heads.mean(), of_heads.var(), agree, np.abs(scores).mean()])


def decide(h, v, attention, s: EntropySettings, last_token=-1, pause_allowed=True) -> Decision:
    """The table of strategies, from top to bottom, with the numbers of the settings as they are."""
    ah, av, agree, inter = attention
    plain = Decision("GREEDY", 0.0, s.top_p, s.top_k, s.min_p)
    if s.temperature == 0 or (h < s.low_entropy and v < s.low_varentropy):
        return plain
    t = s.temperature
    if h > s.high_entropy and v < s.low_varentropy:
        plain.strategy = "PAUSE"
        if s.pause_token is not None and s.pause_token != last_token and pause_allowed:
            plain.forced = s.pause_token
        else:
            factor = s.pause_temperature + s.pause_attention_entropy * ah
            plain.temperature = min(s.pause_max_temperature, t * factor)
        return plain
    if h < s.high_entropy and v > s.high_varentropy:
        factor = s.explore_temperature + s.explore_interaction * inter
        plain.strategy = "EXPLORE"
        plain.temperature = min(s.explore_max_temperature, t * factor)
        wider = math.floor(s.top_k * (1 + s.explore_disagreement * (1 - agree)))
        plain.top_k = max(s.explore_min_top_k, wider)
        return plain
    if h > s.medium_entropy and v > s.high_varentropy:
        factor = s.resample_temperature + s.resample_attention_varentropy * av
        plain.strategy = "RESAMPLE"
        plain.temperature = min(s.resample_max_temperature, t * factor)
        plain.top_p = max(s.resample_min_top_p, s.top_p - s.resample_attention_entropy * ah)
        return plain
    u, ua = h + v, ah + av
    factor = 1 + s.adaptive_uncertainty * u + s.adaptive_attention_uncertainty * ua - s.adaptive_agreement * agree
    top_p = s.top_p * (1 + s.adaptive_top_p_attention_varentropy * av)
    top_k = round(s.top_k * (1 + s.adaptive_top_k_interaction * inter - s.adaptive_top_k_agreement * agree))
    min_p = s.min_p * (1 - s.adaptive_min_p_uncertainty * u)
    return Decision(
        "ADAPTIVE",
        t * factor,
        min(max(top_p, s.adaptive_min_top_p), s.adaptive_max_top_p),
        min(max(top_k, s.adaptive_min_top_k), s.adaptive_max_top_k),
        min(max(min_p, s.adaptive_min_min_p), s.adaptive_max_min_p),
        candidates=s.candidates,
    )


def filtered(logits, d: Decision):
    """What a draw is made from: temperature, then min_p, top_k, top_p, each on the renormalised result of the one
    before. Of equally likely tokens the lower id comes first."""
    if d.temperature == 0:
        return np.float64(np.arange(len(logits)) == np.argmax(logits))
    probs = softmax(np.float64(logits) / d.temperature)
    order = np.lexsort((np.arange(len(probs)), -probs))
    probs = probs[order]
    probs[probs < d.min_p * probs[0]] = 0
    probs /= probs.sum()
    probs[d.top_k :] = 0
    probs /= probs.sum()
    if d.top_p < 1:
        probs[np.cumsum(probs) - probs >= d.top_p] = 0
        probs /= probs.sum()
    out = np.zeros(len(probs))
    out[order] = probs
    return out


def confidence(h, v, attention, s: EntropySettings):
    """The part of a candidate's score that does not depend on it."""
    ah, av, agree, inter = attention
    return (
        s.score_entropy * (1 - h)
        + s.score_attention_entropy * (1 - ah)
        + s.score_varentropy * (1 - v)
        + s.score_attention_varentropy * (1 - av)
        + s.score_agreement * agree
        + s.score_interaction * inter
    )


def best_candidate(logits, tokens, h, v, attention, s: EntropySettings):
    """Which of the drawn tokens has the highest score, the first of equals."""
    log_probs = np.log(softmax(logits))
    scores = [log_probs[token] + confidence(h, v, attention, s) for token in tokens]
    return max(range(len(tokens)), key=lambda i: scores[i])
