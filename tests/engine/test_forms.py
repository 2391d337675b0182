"""The model writes at high temperature, and every answer that ends has the form that was asked for."""

import json
import random
import re

import jsonschema
import pytest
from constraints.random_schemas import random_schema

from sharded_llama import LLM, EntropySettings, SamplingParams, StructuredOutputs, make_mesh
from sharded_llama.errors import RequestError

N_SCHEMAS = 200
FORMATS = jsonschema.FormatChecker(["date", "ipv4", "uuid"])
HOT = {"temperature": 1.5, "max_tokens": 64}


@pytest.fixture(scope="module")
def llm(short_demo):
    return LLM(short_demo, mesh=make_mesh(), progress=False, max_num_seqs=25, max_model_len=128)


def test_answers_to_random_schemas_validate(llm):
    """What max_tokens cuts off is the beginning of such an answer."""
    rng, schemas, params = random.Random(7), [], []
    while len(params) < N_SCHEMAS:
        schema = random_schema(rng)
        form = StructuredOutputs(json=schema, disable_any_whitespace=True)
        try:
            llm.engine.compile_grammar(SamplingParams(structured_outputs=form))
        except RequestError:  # a few ask for what cannot be
            continue
        params.append(SamplingParams(structured_outputs=form, seed=len(params), **HOT))
        schemas.append(schema)
    outputs = [o.outputs[0] for o in llm.generate(["KING:"] * N_SCHEMAS, params)]
    assert {o.finish_reason for o in outputs} <= {"stop", "length"}
    ended = [(schema, o) for schema, o in zip(schemas, outputs, strict=True) if o.finish_reason == "stop"]
    assert len(ended) > N_SCHEMAS / 5
    for schema, output in ended:
        jsonschema.Draft202012Validator(schema, format_checker=FORMATS).validate(json.loads(output.text))


def test_other_forms_among_plain_requests(llm):
    """The plain ones write what they write without the others."""
    forms = [
        StructuredOutputs(regex=r"[0-9]{3}-[a-z]{2,4}"),
        StructuredOutputs(choice=["to be", "not to be"]),
        StructuredOutputs(json_object=True, disable_any_whitespace=True),
        StructuredOutputs(grammar='start: "a" INNER "b"\nINNER: /[0-9]+/'),
    ]
    plain = [SamplingParams(seed=i, ignore_eos=True, **HOT) for i in range(4)]
    bound = [SamplingParams(structured_outputs=f, seed=i, **HOT) for i, f in enumerate(forms)]
    prompts = ["ROMEO:", "JULIET:", "FRIAR:", "NURSE:"]
    alone = [o.outputs[0].token_ids for o in llm.generate(prompts, plain)]
    outputs = [o.outputs[0] for o in llm.generate(prompts + prompts, plain + bound)]
    assert [o.token_ids for o in outputs[:4]] == alone
    expected = [r"[0-9]{3}-[a-z]{2,4}", "to be|not to be", r"\{.*", "a[0-9]+b"]
    for output, pattern in zip(outputs[4:], expected, strict=True):
        assert output.finish_reason in ("stop", "length")
        if output.finish_reason == "stop":
            assert re.fullmatch(pattern, output.text, re.DOTALL)
    assert [o.finish_reason for o in outputs[4:6]] == ["stop", "stop"]
    if outputs[6].finish_reason == "stop":
        assert isinstance(json.loads(outputs[6].text), dict)


@pytest.mark.parametrize(
    "form",
    [
        {"json": {"type": "object", "unevaluatedProperties": False}},
        {"json": {"$ref": "https://example.com/schema"}},
        {"regex": "(a"},
        {"grammar": "start: missing"},
    ],
    ids=str,
)
def test_what_cannot_be_enforced_is_refused_before_anything_runs(llm, form):
    before = llm.engine.stats().seconds.steps
    with pytest.raises(RequestError):
        llm.generate(["a"], SamplingParams(structured_outputs=StructuredOutputs(**form)))
    assert llm.engine.stats().seconds.steps == before


def test_allowed_tokens_that_the_form_never_permits_are_refused(llm):
    digits = StructuredOutputs(regex="[0-9]+")
    with pytest.raises(RequestError, match="without any that the grammar permits"):
        llm.generate(["a"], SamplingParams(structured_outputs=digits, allowed_token_ids=llm.encode("x")[-1:]))


def test_entropy_needs_its_option(llm):
    with pytest.raises(RequestError, match="entropy_sampler=True"):
        llm.generate(["a"], SamplingParams(entropy=EntropySettings()))
