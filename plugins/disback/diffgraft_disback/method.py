"""Distribution backtracking (Zhang et al., arXiv 2408.15991) in the paper's symbols; free of diffusers.

A one-step student G_stu(z) is trained by the difference of two scores at its noised samples. Plain score distillation compares with the
teacher's from the first step on, which knows nothing of where the student's samples lie. Here a copy of the teacher is first trained on
the samples of the student as it begins, and kept at N points: theta_0 = the teacher, ..., theta_N, the degradation path. The student
then walks it backwards.
"""

from __future__ import annotations

from typing import NamedTuple


class Path(NamedTuple):
    """The two stages of a fit.

    points   N: what is kept on the way from the teacher to the student's beginning; 0: there is no way, and no first stage
    record   steps of the first stage, degradation recording
    stay     steps of the second stage for each target, before it becomes the one nearer to the teacher
    """

    points: int
    record: int
    stay: int

    def kept_at(self, step: int) -> int | None:
        """k where theta_k is to be kept before this step: after k N-ths of the first stage. theta_0 is the teacher and is not kept."""
        kept = [k for k in range(1, self.points + 1) if round(k * self.record / self.points) == step]
        return kept[-1] if kept else None

    def target(self, step: int) -> int:
        """k of the theta_k that the student goes towards in a step of the second stage: N - 1, ..., 0, and then the teacher always.

        theta_N is where the second score begins: against it there is no difference yet.
        """
        return max(self.points - 1 - (step - self.record) // self.stay, 0)

    def records(self, step: int) -> bool:
        """Whether a step belongs to the first stage, in which the student stays as it is."""
        return step < self.record

    def moves(self, step: int, every: int) -> bool:
        """Whether the student is moved in a step: in one of ``every`` of the second stage."""
        return step >= self.record and (step - self.record) % every == 0
