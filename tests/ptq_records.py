"""Records of the study ptq_overtraining, made up."""

LENGTHS = (10, 30, 90)


def record(seed, schedule, added, size="14k", lengths=LENGTHS, base=2.0, epochs=None, **trial):
    """A finished record: what 4 bits per tensor add at each length, and the loss before."""
    passes = epochs or [1.0] * len(lengths)
    point = {"base": {"valid": {"mean": base, "se": 0.1}}, "windows": {"valid": 4}}
    point["curve"] = [[1, 3.0], [2, 2.5]]
    kind = {"split": "valid", "granularity": "tensor", "scope": "linears", "bits": 4, "se": 0.01}
    points = [
        point
        | {"tokens_per_parameter": d, "tokens": d * 1000, "epochs": e}
        | {"added": [kind | {"mean": x}]}
        for d, x, e in zip(lengths, added, passes, strict=True)
    ]
    own = {
        "size": size, "schedule": schedule, "seed": seed, "tokens_per_parameter": list(lengths),
        "data": "sotu", "data_path": "", "data_fingerprint": "0", "sequence": 64, "batch": 16,
        "peak_lr": 0.1, "dtype": "float32", "evaluation_windows": 4,
    }  # fmt: skip
    changed = "-".join(map(str, trial.values())).replace("/", "_")
    name = f"{seed}{schedule}{size}{changed}"
    return {
        "id": name,
        "status": "done",
        "trial": own | trial,
        "versions": {"jax": "0"},
        "points": points,
    }
