"""Who is timed: the dense layer, ours, a plain loop, and the peers that can be had."""

from ..moe.layer import MoE
from .checks import check
from .layer import Batch, Contestant, dense, own_experts, own_layer, own_sunk_experts, plain_loop
from .peers import PACKAGES, Absent, Request, peers_of
from .shape import Shape


def own(shape: Shape, moe: MoE) -> list[Contestant]:
    """What is always timed, the dense layer first."""
    sunk = [own_sunk_experts(shape, moe)] if moe.training else []
    return [dense(shape), own_experts(shape, moe), *sunk, own_layer(shape, moe)]


def find(name: str, request: Request) -> Contestant:
    """The contestant of a name, without building those of other packages."""
    found = [*own(request.shape, request.moe), plain_loop(request.shape, request.moe)]
    for package in PACKAGES:
        if name.startswith(package):
            found += [peer for peer in peers_of(package, request) if isinstance(peer, Contestant)]
    return next(contestant for contestant in found if contestant.name == name)


def admit(peer: Contestant | Absent, batch: Batch, shape: Shape, *, training: bool) -> Contestant | Absent:
    """A peer that fits and has passed its check, or why it is not timed."""
    if isinstance(peer, Absent):
        return peer
    reason = peer.obstacle(shape, training)
    if reason is None:
        try:
            check(peer, batch, training=training)
        except Exception as error:  # of foreign code, which can raise anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return peer if reason is None else Absent(peer.name, reason)
