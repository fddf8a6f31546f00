"""People's own tastes: embeddings of users, the adapter that reads them, pipelines that draw for one of them.

The names below are imported when they are asked for: a loader's processes need none of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffpref.users.consensus import best_of_neighbours
    from diffpref.users.embedding import UserEmbedding
    from diffpref.users.encoder import UserEncoder
    from diffpref.users.few_shot import Pair, encode_user
    from diffpref.users.personalized import PersonalizedPipeline, load_user_adapter

__all__ = [
    "Pair", "PersonalizedPipeline", "UserEmbedding", "UserEncoder", "best_of_neighbours", "encode_user",
    "load_user_adapter",
]  # fmt: skip

WHERE = {
    "Pair": "few_shot",
    "PersonalizedPipeline": "personalized",
    "UserEmbedding": "embedding",
    "UserEncoder": "encoder",
    "best_of_neighbours": "consensus",
    "encode_user": "few_shot",
    "load_user_adapter": "personalized",
}


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{WHERE[name]}"), name)
