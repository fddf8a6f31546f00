"""Who somebody is to a model: one unit vector, or a sequence of vectors, and which encoder it came from.

A file of it is safetensors: the tensor `user` [L,U] in fp32, and in its metadata format, encoder, pairs and name.
"""

import math
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from diffpref.noise.keys import generator
from diffpref.scorer.weights import damage_named
from diffpref.synpic.files import written_whole

FORMAT, TENSOR = "1", "user"
PARALLEL, OPPOSITE = 1e-6, 1e-3  # radians from 0 and from π where sin Ω is too small to divide by


@dataclass(frozen=True, eq=False)
class UserEmbedding:
    """A user as the adapter takes one.

    states: [L,U], kept in fp32 on the CPU; L = 1 is one vector, and [U] may be given for it.  encoder: the id of what
    made it; vectors of different encoders have nothing in common.  pairs: of how many choices.  name: whose.

    Raises ValueError for another shape, for what is NaN or infinite, and for an encoder or a number that is none.
    """

    states: Tensor
    encoder: str
    pairs: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        states = self.states.detach().float().cpu()
        states = (states[None] if states.ndim == 1 else states).contiguous()
        if states.ndim != 2 or not states.numel():
            raise ValueError(f"a user is one vector [U] or several [L,U], not {list(self.states.shape)}")
        if not states.isfinite().all():
            raise ValueError(f"the embedding of {self.name or 'this user'} has NaN or infinite numbers; make it again")
        if not isinstance(self.encoder, str) or not isinstance(self.pairs, int) or self.pairs < 0:
            raise ValueError(f"encoder {self.encoder!r} is no name, or {self.pairs!r} no number of pairs")
        object.__setattr__(self, "states", states)

    @property
    def width(self) -> int:
        """U."""
        return self.states.shape[1]

    @property
    def sequence(self) -> bool:
        """Whether it is several vectors."""
        return len(self.states) > 1

    def save(self, path: str | PathLike[str]) -> None:
        """Write it to a safetensors file, whole or not at all."""
        facts = {"format": FORMAT, "encoder": self.encoder, "pairs": str(self.pairs), "name": self.name}
        with written_whole(Path(path)) as beside:
            save_file({TENSOR: self.states}, beside, facts)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "UserEmbedding":
        """Read such a file. Raises FileNotFoundError, or ValueError for one that holds no user."""
        path = Path(path)
        if path.is_dir():
            raise ValueError(
                f"{path} is a folder; a user is a file, as `diffpref user embed --out me.safetensors` writes"
            )
        with damage_named(path), safe_open(path, "pt") as file:
            facts, names = file.metadata() or {}, set(file.keys())
            states = file.get_tensor(TENSOR) if names == {TENSOR} else None
        pairs = facts.get("pairs", "")
        if states is None or facts.get("format") != FORMAT or "encoder" not in facts or not pairs.isdigit():
            raise ValueError(f"{path} holds no user of format {FORMAT}: `diffpref user embed` writes such files")
        try:
            return cls(states, facts["encoder"], int(pairs), facts.get("name", ""))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def mix(self, other: "UserEmbedding", amount: float) -> "UserEmbedding":
        """Somebody between the two, `amount` of the way to the other: 0 is this user, 1 the other.

        Directions turn and lengths go straight, vector by vector: the adapter's layer norm knows little of length, so
        a straight line between two opposite users would stay with the one, then jump to the other.

        Raises ValueError for users of different encoders or shapes, another amount, and opposite or zero vectors.
        """
        if not 0 <= amount <= 1:
            raise ValueError(f"amount is {amount}; it goes from 0, this user, to 1, the other")
        if self.encoder != other.encoder or self.states.shape != other.states.shape:
            raise ValueError(f"only users of one encoder can be mixed, not {described(self)} and {described(other)}")
        name = f"{1 - amount:g} {self.name} + {amount:g} {other.name}" if self.name and other.name else ""
        return replace(self, states=slerp(self.states, other.states, amount), pairs=self.pairs + other.pairs, name=name)

    def neighbours(self, k: int, max_angle: float = 30.0, seed: int = 0) -> list["UserEmbedding"]:
        """This user and k − 1 others around: of each vector the angle to it is uniform in [0, max_angle] degrees, the
        side to which it turns is any. The same for the same seed.

        Raises ValueError for k below 1, an angle outside [0, 90], and for a zero vector.
        """
        if k < 1 or not 0 <= max_angle <= 90:
            raise ValueError(f"k is {k} and max_angle {max_angle}; they must be at least 1, and from 0 to 90 degrees")
        made = [replace(self, states=turned(self.states, max_angle, (seed, number))) for number in range(1, k)]
        return [self, *made]

    def conditioning(self, guidance: bool = True) -> dict[str, Any]:
        """Arguments of a stock pipeline on a UNet whose adapter was loaded with `load_ip_adapter`:
        `pipe(prompt, **user.conditioning())`. With `guidance` off for guidance_scale ≤ 1, where no second half is run.

        How strong the user is, is no part of it: the adapter's layer norm takes the length away, so that
        `pipe.set_ip_adapter_scale` says it. PersonalizedPipeline does both, for every family.
        """
        own = layout(self.states, self.sequence)
        return {"ip_adapter_image_embeds": [torch.cat([torch.zeros_like(own), own]) if guidance else own]}


def layout(states: Tensor, sequence: bool) -> Tensor:
    """[L,U] -> what adapters take: [1,1,U] of one vector, [1,1,L,U] of a sequence."""
    return states[None, None] if sequence else states[None]


def described(user: UserEmbedding) -> str:
    """In a message."""
    shape = " x ".join(map(str, user.states.shape))
    return f"{user.name or 'a user'} ({shape}, of the encoder {user.encoder or 'without a name'})"


# --- directions -------------------------------------------------------------------------------------------------------


def slerp(first: Tensor, second: Tensor, amount: float) -> Tensor:
    """[L,U] and [L,U] -> [L,U]. Raises ValueError for zero vectors, and for opposite ones: no one way is between."""
    a, b = first.double(), second.double()
    lengths = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    if not (lengths[0].all() and lengths[1].all()):
        raise ValueError("nobody (a zero vector) has no direction to mix; the adapter's scale makes a user weaker")
    length = lengths[0] + amount * (lengths[1] - lengths[0])
    return (length * turn(a / lengths[0], b / lengths[1], amount)).float()


# Shoemake, 1985: slerp(a, b; t) = (sin((1 − t)Ω) a + sin(tΩ) b) / sin Ω,  Ω the angle between the unit vectors.
# Ω = 2 atan2(|a − b|, |a + b|) (Kahan) is exact also near 0 and π, where arccos(a·b) is not.
def turn(a: Tensor, b: Tensor, amount: float) -> Tensor:
    """Unit vectors [L,U] and [L,U] -> unit vectors, `amount` of the angle from a to b."""
    omega = 2 * torch.atan2((a - b).norm(dim=1, keepdim=True), (a + b).norm(dim=1, keepdim=True))
    if (omega > math.pi - OPPOSITE).any():
        raise ValueError("the two users are opposite: no one way leads from the one to the other")
    close, safe = omega < PARALLEL, omega.clamp(min=PARALLEL)
    mixed = (torch.sin((1 - amount) * safe) * a + torch.sin(amount * safe) * b) / safe.sin()
    return torch.where(close, a + amount * (b - a), mixed)


def turned(states: Tensor, max_angle: float, key: tuple[int, ...]) -> Tensor:
    """[L,U] with every vector turned by an angle uniform in [0, max_angle] degrees to a side that is drawn."""
    if not states.norm(dim=1).all():
        raise ValueError("nobody (a zero vector) has no direction, so no neighbours")
    random = generator(*key)
    angle = torch.rand(len(states), 1, generator=random, dtype=torch.float64) * math.radians(max_angle)
    side = torch.randn(states.shape, generator=random, dtype=torch.float64)
    own = normalize(states.double(), dim=1)
    across = normalize(side - (side * own).sum(dim=1, keepdim=True) * own, dim=1)
    return (states.double().norm(dim=1, keepdim=True) * (angle.cos() * own + angle.sin() * across)).float()
