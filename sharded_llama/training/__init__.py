"""Training: the same `xfmr` that generates, differentiated.

    settings       TrainSettings                     step           loss, gradient, optimizer: one jitted step
    tokenizer      byte-level BPE of a text          checkpointing  the state on disk, and resuming
    data           text to batches                   run_folder     what a run leaves on disk, and its rules
    loss           next-token cross-entropy          loop           a whole run
    evaluation     held-out loss, bits per byte      report         log.jsonl and loss.png

optax, orbax and matplotlib are needed here alone, and not for evaluation.
"""
