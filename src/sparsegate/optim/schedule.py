"""Learning rate schedules: functions of the step alone."""


def warmup_then_inverse_sqrt(*, step: int, peak: float, warmup_steps: int) -> float:
    """The paper's schedule (appendix C.1): linear to `peak` at step `warmup_steps`, then as 1/sqrt(step).

    step: counts from 1, the first update.

    >>> [warmup_then_inverse_sqrt(step=s, peak=1.0, warmup_steps=4) for s in (1, 4, 16)]
    [0.25, 1.0, 0.5]
    """
    warmup_steps = max(warmup_steps, 1)
    return peak * min(step / warmup_steps, (warmup_steps / step) ** 0.5)
