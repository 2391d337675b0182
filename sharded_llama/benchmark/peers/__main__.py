"""`python -m sharded_llama.benchmark.peers JOB RESULT`: runs rows through a peer in a process of its own.

JOB is a JSON file: peer, folder (of a Hugging Face checkpoint), dtype, device, max_model_len, max_num_seqs, steps,
rounds, rest_ms, rows. RESULT gets the rows with the peer's times. So the peer has the accelerator for itself.
"""

import json
import sys
from pathlib import Path

from ...json_file import read_json_object
from . import Peer, complete


def open_peer(job: dict) -> Peer:
    if job["peer"] == "vllm":
        from .vllm import VllmPeer

        return VllmPeer(job["folder"], job["dtype"], job["max_model_len"], job["max_num_seqs"])
    from .hf import HfPeer

    return HfPeer(job["folder"], job["dtype"], job["device"])


def main() -> None:
    job_file, result_file = sys.argv[1:]
    job = read_json_object(job_file)
    how = {name: job[name] for name in ("steps", "rounds", "rest_ms")}
    rows = complete(job["rows"], job["peer"], open_peer(job), **how)
    Path(result_file).write_text(json.dumps({"rows": rows}), encoding="utf-8")


if __name__ == "__main__":
    main()
