"""Times the scheduler by itself: Python per step, with full slots that decode and a long queue.

    python -m benchmarks.scheduler --running=256 --waiting=1000

Every sequence has `--prompt` tokens in common with the others and one of its own, and `--generate` tokens to make; one
that ends is replaced at the end of the queue. `steady` are steps in which only decoding happens, `all` every step:
also admissions, endings and chunks. Microseconds of one step are `schedule` and `update` together; tokens are read
one step late, as the engine does.
"""

import collections
import platform
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from jax.sharding import Mesh

from sharded_llama.benchmark import record
from sharded_llama.engine.scheduler import Scheduler, SchedulerConfig
from sharded_llama.engine.sequence import Sequence

RUNNING = flags.DEFINE_integer("running", 256, "Slots of all shards.")
SHARDS = flags.DEFINE_list("shards", ["1", "4"], "Data shards, one run for each.")
WAITING = flags.DEFINE_integer("waiting", 1000, "Sequences in the queue.")
PROMPT = flags.DEFINE_integer("prompt", 512, "Tokens of a prompt.")
GENERATE = flags.DEFINE_integer("generate", 256, "Tokens that a sequence generates.")
STEPS = flags.DEFINE_integer("steps", 2000, "Timed steps, after as many as it takes to fill the slots.")
NAME = flags.DEFINE_string("name", "scheduler_cpu", "Name of the result.")
OUT = flags.DEFINE_string("out", "benchmarks/results", "Folder of the result.")


def config_of(n_shards: int, page_size: int = 16) -> SchedulerConfig:
    """Enough pages that nothing is preempted."""
    slots, longest = RUNNING.value // n_shards, PROMPT.value + 1 + GENERATE.value
    return SchedulerConfig(
        n_shards=n_shards,
        slots_per_shard=slots,
        pages_per_shard=(slots + 1) * -(-longest // page_size),
        page_size=page_size,
        max_model_len=longest,
        block=16,
        max_blocks=128,
        max_batched_tokens=2048 + slots,
        decode_steps=1,
        prefix_caching=True,
    )


def time_steps(n_shards: int) -> list[dict[str, float | int | str]]:
    """Percentiles of microseconds per step."""
    scheduler = Scheduler(config_of(n_shards))
    rng = np.random.default_rng(0)
    common = rng.integers(0, 100_000, PROMPT.value).tolist()
    n_added = 0

    def add() -> None:
        nonlocal n_added
        # Lengths differ, or all sequences of the start would end in one step.
        n_new = int(rng.integers(1, 2 * GENERATE.value)) if n_added < RUNNING.value else GENERATE.value
        seq = Sequence(request_id=str(n_added), prompt=[*common, n_added], max_tokens=n_new, arrival=n_added)
        scheduler.add(seq)
        n_added += 1

    for _ in range(RUNNING.value + WAITING.value):
        add()
    times: dict[str, list[float]] = {"steady": [], "all": []}
    unread: collections.deque = collections.deque()
    filled = False
    while len(times["all"]) < STEPS.value:
        start = time.thread_time()
        plan = scheduler.schedule()
        scheduled = time.thread_time()
        assert plan is not None
        unread.append((plan, rng.integers(0, 100_000, (plan.n_steps, len(plan.rows)))))
        ended = 0
        spent = scheduled - start
        if len(unread) > 1:
            start = time.thread_time()
            read = scheduler.update(*unread.popleft())
            spent += time.thread_time() - start
            ended = sum(seq.finish_reason is not None for seq, _ in read)
        filled |= sum(map(len, plan.decode)) == RUNNING.value
        if filled:
            times["all"].append(spent)
            if not ended and not any(plan.chunks):
                times["steady"].append(spent)
        for _ in range(ended):
            add()
    shares = {"median": 50, "p90": 90, "p99": 99}
    return [
        {"shards": n_shards, "steps": kind, "timed": len(seconds)}
        | {f"{name}_us": round(1e6 * float(np.percentile(seconds, share)), 1) for name, share in shares.items()}
        | {"mean_us": round(1e6 * float(np.mean(seconds)), 1)}
        for kind, seconds in times.items()
    ]


def processor() -> str:
    """Name of this machine's processor, as far as Linux tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main(_: list[str]) -> None:
    results = []
    for n_shards in map(int, SHARDS.value):
        for row in time_steps(n_shards):
            print(row, flush=True)
            results.append(row)
    workload = {name: flags.FLAGS[name].value for name in ("running", "waiting", "prompt", "generate")}
    host = Mesh(np.array(jax.devices("cpu")[:1]), ("host",))  # no device is used; the record wants a name
    print(record.save(NAME.value, record.device_of(host), workload | {"processor": processor()}, results, OUT.value))


if __name__ == "__main__":
    app.run(main)
