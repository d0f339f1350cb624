"""Learning rate schedules: functions of the step alone."""


def warmup_then_inverse_sqrt(*, step: int, peak: float, warmup_steps: int, constant_steps: int = 0) -> float:
    """The paper's schedule: linear to `peak` at step `warmup_steps`, constant, then as 1/sqrt(step).

    step: counts from 1, the first update. constant_steps: after the warm-up; the language models have none
    (appendix C.1), the translation models 8000 (appendix E).

    >>> [warmup_then_inverse_sqrt(step=s, peak=1.0, warmup_steps=4) for s in (1, 4, 16)]
    [0.25, 1.0, 0.5]
    >>> [warmup_then_inverse_sqrt(step=s, peak=1.0, warmup_steps=2, constant_steps=2) for s in (1, 4, 16)]
    [0.5, 1.0, 0.5]
    """
    warmup_steps = max(warmup_steps, 1)
    return peak * min(1.0, step / warmup_steps, ((warmup_steps + constant_steps) / step) ** 0.5)
