"""The paper's experts: one hidden ReLU layer, no biases, stacked."""

from .stacked import StackedExperts


class FeedForward(StackedExperts):
    """E experts relu(x W_in) W_out: w_in [E, width, hidden], w_out [E, hidden, width]."""

    activation = "relu"

    def reset_parameters(self) -> None:
        """Normal of variance 2/fan_in before the ReLU and 1/fan_in after it: activations keep their size."""
        _, width, hidden = self.w_in.shape
        self.draw(std_in=(2 / width) ** 0.5, std_out=hidden**-0.5)
