"""Two processes of four simulated devices each give the text of one process with eight."""

import json
import re
import socket

import launchers
import pytest
from hf_reference import make_model, save

PROMPTS = ["0 1", "the quick", ""]
ONE_STEP = "--decode_steps=1"  # one kind of step to compile instead of two


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    path = save(make_model("grouped", vocab_size=300, num_hidden_layers=2), tmp_path_factory.mktemp("model"))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(n_processes, devices, mesh, folder, output, *extra):
    """Runs the launcher in `n_processes` processes; returns (exit status, standard output, standard error) of each."""
    common = [
        *(f"--checkpoint={folder}", f"--simulate_devices={devices}", f"--mesh={mesh}"),
        *("--max_new_tokens=12", "--ignore_eos", f"--output={output}", *extra),
    ]
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    started = []
    for i in range(n_processes):
        several = [address, f"--num_processes={n_processes}", f"--process_id={i}"] if n_processes > 1 else []
        # Only process 0 has the prompts.
        prompts = [f"--prompt={p}" for p in PROMPTS] if i == 0 else []
        started.append(launchers.start("generate", *common, *several, *prompts, without=("XLA_FLAGS",)))
    return [process.finish() for process in started]


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def one_process(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("one") / "out.jsonl"
    ((status, _, stderr),) = run(1, 8, "data:2,model:4", folder, output)
    assert status == 0, stderr
    return records(output)


# data:2,model:4 has one data shard in each process; data:1,model:8 has every layer's sums across the processes.
# With guesses, by the model itself, the steps of two models travel.
@pytest.mark.parametrize(
    ("mesh", "speculates"), [("data:2,model:4", False), ("data:1,model:8", False), ("data:4,model:2", True)]
)
def test_same_text_as_one_process(folder, one_process, mesh, speculates, tmp_path):
    output = tmp_path / "out.jsonl"
    extra = (f"--draft_model={folder}", "--num_speculative_tokens=3") if speculates else ()
    if mesh != "data:2,model:4":
        extra = (*extra, ONE_STEP)
    (status0, stdout0, stderr0), (status1, stdout1, stderr1) = run(2, 4, mesh, folder, output, *extra)
    assert (status0, status1) == (0, 0), stderr0 + stderr1
    assert records(output) == one_process
    assert "8 cpu devices" in stderr0
    assert ("accepted (100%)" in stderr0) == speculates
    assert PROMPTS[1] in stdout0
    assert stdout1 == "", "only process 0 writes the output"


def test_sampled_text_and_a_mistake_in_every_process(folder, tmp_path):
    """Fresh seeds are agreed on (otherwise the processes' steps would differ), and an error ends all of them."""
    output = tmp_path / "out.jsonl"
    results = run(2, 4, "data:2,model:4", folder, output, "--temperature=1.0", ONE_STEP)
    assert [r[0] for r in results] == [0, 0], results
    assert len(records(output)) == len(PROMPTS)

    results = run(2, 4, "data:2,model:4", folder, output, "--prompt_file=/does/not/exist")
    assert [r[0] for r in results] == [1, 1]
    for _, _, stderr in results:
        assert "error: --prompt_file=/does/not/exist" in stderr
        assert "Traceback" not in stderr


def test_penalties_and_a_form_that_only_process_0_knows(folder, tmp_path):
    """Counts and masks travel with the steps; the device that draws from them may belong to another process."""
    settings = (
        "--sampler=temperature(0.8) top_p(0.9) repetition_penalty(1.2) seed(3)",
        "--regex=[0-9]{3}-[a-z]{2}",
        ONE_STEP,
    )
    output = tmp_path / "out.jsonl"
    results = run(2, 4, "data:2,model:4", folder, output, *settings)
    assert [r[0] for r in results] == [0, 0], results
    together = records(output)
    ((status, _, stderr),) = run(1, 8, "data:2,model:4", folder, output, *settings)
    assert status == 0, stderr
    assert together == records(output)
    assert all(re.fullmatch("[0-9]{3}-[a-z]{2}", record["text"]) for record in together), together
    assert len({record["text"] for record in together}) > 1


def test_a_mesh_that_leaves_a_process_without_a_device(folder, tmp_path):
    results = run(2, 4, "data:1,model:4", folder, tmp_path / "out.jsonl")
    assert [r[0] for r in results] == [1, 1]
    for _, _, stderr in results:
        assert "uses 4 of 8 devices and leaves process 1 without one" in stderr
        assert "Traceback" not in stderr
