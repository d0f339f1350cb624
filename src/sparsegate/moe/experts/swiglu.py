"""SwiGLU experts (Shazeer 2020): the feed-forward network of most mixtures since."""

from .stacked import StackedExperts


class SwiGLU(StackedExperts):
    """E experts (silu(x W) * (x V)) W_out (Shazeer 2020, eq. 6).

    w_in [E, width, 2 * hidden]: its first half of columns is W and the second V. w_out [E, hidden, width].
    Three products of width times hidden where `FeedForward` has two: at equal cost take two thirds of its
    hidden width.
    """

    activation = "swiglu"

    def reset_parameters(self) -> None:
        """Normal of variance 1/fan_in."""
        _, hidden, width = self.w_out.shape
        self.draw(std_in=width**-0.5, std_out=hidden**-0.5)
