"""PreferenceScorer says what its towers and its head say, in every way of asking."""

import threading
import time
from itertools import count, islice

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_scorers import SIZE, WIDTH, pictures, tiny_scorer, tiny_towers
from torch import Tensor

from diffpref.scorer import PreferenceScorer, Scorer, Verdict
from diffpref.scorer.heads.contract import Head, Judged
from diffpref.scorer.score import in_threads

PROMPTS = ["a red cat", "a dog", "snow", "ink on paper", "a boat"]


def by_hand(scorer: PreferenceScorer, images: list[Image.Image], prompts: list[str]) -> Tensor:
    """exp(τ)·<f, t> in fp64, from the model's own features."""
    with torch.no_grad():
        image = scorer.towers.model.encode_image(torch.stack([scorer.towers.preprocess(i) for i in images])).double()
        text = scorer.towers.model.encode_text(scorer.towers.tokenizer(prompts)).double()
        cosine = (image * text).sum(-1) / (image.norm(dim=-1) * text.norm(dim=-1))
        return cosine * scorer.head.logit_scale.double().exp()


@pytest.mark.parametrize("batch_size", [1, 2, 32])
@pytest.mark.parametrize("workers", [0, 3])
def test_scores_are_the_models(batch_size, workers):
    scorer, images = tiny_scorer(), pictures(5)
    scores = scorer.score(images=images, prompts=PROMPTS, batch_size=batch_size, workers=workers)
    assert scores.dtype == torch.float32 and scores.device.type == "cpu" and not scores.is_inference()
    torch.testing.assert_close(scores.double(), by_hand(scorer, images, PROMPTS), rtol=0, atol=3e-5)
    assert scores.std() > 1


def test_comparisons_have_the_temperature_and_are_antisymmetric():
    scorer, images = tiny_scorer(temperature=4.0), pictures(6)
    first, second = images[:3], images[3:]
    scores = [by_hand(scorer, half, PROMPTS[:3]) for half in (first, second)]
    found = scorer.compare(first=first, second=second, prompts=PROMPTS[:3], batch_size=2)
    torch.testing.assert_close(found.double(), torch.sigmoid((scores[0] - scores[1]) / 4), rtol=0, atol=1e-5)
    turned = scorer.compare(first=second, second=first, prompts=PROMPTS[:3])
    torch.testing.assert_close(found + turned, torch.ones(3), rtol=0, atol=1e-6)


def test_comparisons_ask_the_head_where_no_score_says_it():
    """Three pictures of which each is preferred to the next, around."""

    class Cyclic(Head):
        def forward(self, image: Tensor, text: Tensor, user: Tensor | None = None) -> Judged:
            return Judged(scores=torch.zeros(len(image)), vectors=image[:, :2])

        def logit(self, judged: Judged, first: Tensor, second: Tensor) -> Tensor:
            (a, b), (c, d) = judged.vectors[first].T, judged.vectors[second].T
            return 1000 * (a * d - b * c)

    scorer, images = PreferenceScorer(tiny_towers(), Cyclic(), name="cyclic"), pictures(4)
    vectors = scorer.embed(images=images).images.double()
    logit = 1000 * (vectors[:-1, 0] * vectors[1:, 1] - vectors[:-1, 1] * vectors[1:, 0])
    found = scorer.compare(first=images[:-1], second=images[1:], prompts="x")
    torch.testing.assert_close(found.double(), torch.sigmoid(logit), rtol=0, atol=1e-5)
    assert scorer.score(images=images, prompts="x").tolist() == [0] * 4 and (found - 0.5).abs().max() > 0.1


def test_ranks_are_best_first_and_stable():
    scorer, images = tiny_scorer(), pictures(5)
    scores = scorer.score(images=images, prompts="a cat")
    assert scorer.rank(images=images, prompt="a cat") == torch.argsort(scores, descending=True).tolist()
    assert scorer.rank(images=[images[0]] * 3, prompt="a cat", batch_size=1) == [0, 1, 2]
    assert scorer.rank(images=[], prompt="a cat") == []


def test_embeddings_are_unit_vectors_whose_product_is_the_score():
    scorer, images = tiny_scorer(), pictures(5)
    both = scorer.embed(images=images, prompts=PROMPTS, batch_size=2)
    assert both.images.shape == both.prompts.shape == (5, WIDTH) and both.images.dtype == torch.float32
    torch.testing.assert_close(both.images.norm(dim=1), torch.ones(5))
    product = scorer.head.logit_scale.exp() * (both.images * both.prompts).sum(1)
    torch.testing.assert_close(product, scorer.score(images=images, prompts=PROMPTS), rtol=0, atol=1e-5)
    assert scorer.embed(prompts="x").prompts.shape == (1, WIDTH) and scorer.embed(prompts="x").images is None
    assert scorer.embed(images=[]).images.shape == (0, WIDTH)
    (both.images.requires_grad_() ** 2).sum().backward()  # a head can be fitted to them


def test_low_precision_is_for_the_towers_only():
    exact, images = tiny_scorer(), pictures(5)
    rough = PreferenceScorer(tiny_towers(dtype=torch.bfloat16), exact.head, name="rough")
    assert next(rough.towers.parameters()).dtype == torch.float32
    vectors = rough.embed(images=images, prompts=PROMPTS)
    scores = rough.score(images=images, prompts=PROMPTS)
    product = rough.head.logit_scale.double().exp() * (vectors.images.double() * vectors.prompts.double()).sum(1)
    torch.testing.assert_close(scores.double(), product, rtol=0, atol=2e-5)  # of fp32; bf16 would be off by 0.1
    near = exact.score(images=images, prompts=PROMPTS)
    assert 1e-3 < (scores - near).abs().max() < 3


def test_training_has_a_graph_and_forgets_no_change():
    scorer, images = tiny_scorer(), pictures(2)
    before = scorer.score(images=images, prompts="a cat")
    scorer.towers.requires_grad_(True)
    pixels = torch.stack([scorer.towers.preprocess(image) for image in images])
    vectors = scorer.towers.images(pixels) * scorer.towers.texts(scorer.towers.tokenize(["a cat"] * 2))
    vectors.sum().backward()
    optimizer = torch.optim.SGD(scorer.towers.parameters(), lr=10)
    optimizer.step()
    after = scorer.score(images=images, prompts="a cat")
    assert not torch.allclose(before, after)
    scorer.towers.requires_grad_(False)
    assert torch.equal(scorer.score(images=images, prompts="a cat"), after), "no embedding from before the step"


def test_prompts_are_embedded_once():
    scorer, seen = tiny_scorer(), []
    scorer.towers.model.token_embedding.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    scorer.score(images=pictures(6), prompts=["a", "b", "a", "b", "a", "c"], batch_size=2)
    scorer.score(images=pictures(2), prompts="a")
    assert seen == [2, 1]


def test_the_least_used_prompts_are_forgotten(monkeypatch):
    monkeypatch.setattr("diffpref.scorer.preference.REMEMBERED", 2)
    scorer = tiny_scorer()
    for prompt in ("a", "b", "a", "c"):
        scorer.score(images=pictures(1), prompts=prompt)
    assert list(scorer.remembered) == ["a", "c"]
    scores = scorer.score(images=pictures(4), prompts=["d", "e", "f", "a"])  # more than are kept
    torch.testing.assert_close(scores.double(), by_hand(scorer, pictures(4), ["d", "e", "f", "a"]), rtol=0, atol=3e-5)


def test_the_same_opened_file_may_stand_in_a_list_twice(tmp_path):
    pictures(1, size=(300, 300))[0].save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        scores = tiny_scorer().score(images=[image] * 20, prompts="a", batch_size=20, workers=4)
    assert len(scores.unique()) == 1


# --- streams ----------------------------------------------------------------------------------------------------------


def test_a_stream_goes_on_where_a_picture_cannot_be_used(tmp_path):
    scorer, (a, b) = tiny_scorer(), pictures(2)
    (tmp_path / "empty.png").touch()
    a.save(tmp_path / "a.gif", save_all=True, append_images=[b])
    items = [(a, "x"), (tmp_path / "empty.png", "x"), (b, ""), (tmp_path / "gone.png", "x"), (b, "y"), (a, 3)]
    items += [(Image.new("RGB", (9000, 2)), "x"), (tmp_path / "a.gif", "x")]
    verdicts = list(scorer.stream(items, batch_size=3, workers=2))
    scores = scorer.score(images=[a, b], prompts=["x", "y"]).tolist()
    assert verdicts[0].score == pytest.approx(scores[0], abs=1e-5) and verdicts[0].fault is None
    assert verdicts[4].score == pytest.approx(scores[1], abs=1e-5)
    assert [v.fault for v in verdicts[1:4]] == [
        f"picture empty: {tmp_path}/empty.png has length 0",
        "prompt empty: this scorer judges how well a picture fits its prompt",
        f"picture missing: no file {tmp_path}/gone.png",
    ]
    assert verdicts[5] == Verdict(None, "a prompt is a string, not int")
    assert verdicts[6] == Verdict(None, "too narrow: 9000 x 2, more than 100 times")
    assert verdicts[7].score == pytest.approx(scores[0], abs=3), "of an animation the first frame counts"
    assert len(verdicts) == 8 and list(scorer.stream([])) == []


def test_a_stream_holds_a_bounded_number():
    """Of a source without an end, only a few batches are taken beyond what was asked for."""
    taken, image = count(), pictures(1)[0]
    items = ((image, "x") for _ in taken)
    verdicts = list(islice(tiny_scorer().stream(items, batch_size=4, workers=2), 10))
    assert len(verdicts) == 10 and next(taken) <= 12 + 8 + 2


def test_threads_work_ahead_in_order_and_stop():
    started, release = [], threading.Event()

    def slow(number: int) -> int:
        started.append(number)
        release.wait(10)
        return number

    results = in_threads(slow, count(), workers=2, ahead=5)
    threading.Timer(0.05, release.set).start()
    assert [next(results) for _ in range(20)] == list(range(20))
    results.close()
    assert max(started) <= 20 + 5 and not [t for t in threading.enumerate() if "ThreadPool" in t.name]


def test_an_error_in_the_source_reaches_the_caller():
    def broken():
        yield pictures(1)[0], "x"
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(tiny_scorer().stream(broken(), workers=2))


def test_a_score_that_is_no_number_is_a_fault():
    scorer = tiny_scorer(head="affine")
    scorer.head.bias.fill_(torch.inf)
    assert list(scorer.stream([(pictures(1)[0], "x")])) == [Verdict(None, "score not finite: inf")]
    with pytest.raises(ValueError, match="^picture 0: tiny gives inf, no number"):
        scorer.score(images=pictures(2), prompts="x")


# --- what cannot be scored --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([pictures(1)[0], b""], ValueError, "^picture 1: picture empty: its bytes has length 0"),
        ([pictures(1)[0]] * 3 + ["gone.png"], FileNotFoundError, "^picture 3: picture missing: no file gone.png"),
        ([np.zeros((4, 4, 3)) - 1], ValueError, r"^picture 0: range not known: floats from -1 to -1"),
        ([Image.new("RGB", (500, 3))], ValueError, "^picture 0: too narrow: 500 x 3"),
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_cannot_be_scored_is_named(images, error, message, workers):
    for ask in (tiny_scorer().score, tiny_scorer().embed):
        with pytest.raises(error, match=message):
            ask(images=images, prompts="x", batch_size=2, workers=workers)
    with pytest.raises(error, match=message):
        tiny_scorer().compare(first=images, second=images, prompts="x", batch_size=2, workers=workers)


def test_too_many_pixels_are_refused(monkeypatch, tmp_path):
    pictures(1)[0].save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(ValueError, match="^picture 0: too many pixels: 1280, the limit is 500"):
        tiny_scorer().score(images=tmp_path, prompts="x")


@pytest.mark.parametrize("second", [pictures(2), iter(pictures(2)), iter(pictures(4))])
def test_comparisons_of_different_numbers_are_refused(second):
    with pytest.raises(ValueError, match=r"3 first pictures and 2 second ones|second pictures for (3|\d) pictures"):
        tiny_scorer().compare(first=pictures(3), second=second, prompts="x")


def test_impossible_sizes_of_batches_are_refused():
    for options in ({"batch_size": 0}, {"workers": -1}):
        with pytest.raises(ValueError, match="they must be at least 1 and 0"):
            tiny_scorer().score(images=pictures(1), prompts="x", **options)


def test_arguments_have_names():
    with pytest.raises(TypeError, match="positional argument"):
        tiny_scorer().score(pictures(1), "x")  # pyright: ignore


def test_a_scorer_of_pictures_alone_needs_no_prompt():
    scorer = tiny_scorer(head="affine", needs_prompt=False)
    scorer.head.weight.copy_(torch.arange(WIDTH))
    vectors = scorer.embed(images=pictures(3)).images
    torch.testing.assert_close(scorer.score(images=pictures(3)), vectors @ torch.arange(WIDTH).float())
    assert next(scorer.stream([(pictures(1)[0], None)])).fault is None


# --- users ------------------------------------------------------------------------------------------------------------


class Tastes(Head):
    """A number for each user, and for the population (-1) none."""

    def forward(self, image: Tensor, text: Tensor, user: Tensor | None = None) -> Judged:
        return Judged(scores=(user + 1.0))


def test_scores_of_one_user():
    scorer = PreferenceScorer(tiny_towers(), Tastes(), name="tastes", users=["anna", "bo"])
    assert scorer.score(images=pictures(2), prompts="x").tolist() == [0, 0]
    assert scorer.score(images=pictures(2), prompts="x", user="bo").tolist() == [2, 2]
    assert scorer.for_user("anna").rank(images=pictures(2), prompt="x") == [0, 1]
    assert scorer.score(images=pictures(1), prompts="x").tolist() == [0], "the scorer itself has not changed"
    with pytest.raises(ValueError, match="the scorer tastes knows 2 users, among them 'anna', not 'cy'"):
        scorer.score(images=pictures(1), prompts="x", user="cy")
    with pytest.raises(ValueError, match="the scorer tiny knows no users, not 'anna'"):
        tiny_scorer().score(images=pictures(1), prompts="x", user="anna")


# --- any scorer -------------------------------------------------------------------------------------------------------


class Brightness(Scorer):
    """A scorer of one's own: two methods."""

    name, needs_prompt = "brightness", False

    def prepare(self, picture: Image.Image) -> float:
        assert picture.mode == "RGB"
        return float(np.asarray(picture).mean())

    def judge(self, prepared: list[float], prompts: list[str]) -> Tensor:
        return torch.tensor(prepared)


def test_two_methods_make_a_scorer():
    grey, white = Image.new("L", (4, 4), 51), Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert Brightness().score(images=[grey, white]).tolist() == [51, 255]
    assert Brightness().rank(images=[grey, white]) == [1, 0]
    assert Brightness().compare(first=[grey], second=[grey]).tolist() == [0.5]
    with pytest.raises(ValueError, match="the scorer brightness knows no users: leave user out, got 'anna'"):
        Brightness().score(images=grey, user="anna")


def test_a_bar_is_shown_if_asked(capsys):
    tiny_scorer().score(images=pictures(3), prompts="x", batch_size=2, progress=True)
    assert "3/3" in capsys.readouterr().err
    tiny_scorer().score(images=pictures(3), prompts="x", batch_size=2)
    assert capsys.readouterr().err == ""


# --- speed ------------------------------------------------------------------------------------------------------------


def test_decoding_overlaps_with_judging():
    """While a batch is judged, threads prepare the next."""
    prepared, image = [], pictures(1)[0]

    class Watched(Brightness):
        def prepare(self, picture: Image.Image) -> float:
            prepared.append(1)
            return 0.0

        def judge(self, given: list[float], prompts: list[str]) -> Tensor:
            before, limit = len(prepared), time.monotonic() + 10
            while len(prepared) < min(before + 2, 40) and time.monotonic() < limit:
                time.sleep(0.001)
            grown.append(len(prepared) - before)
            return torch.zeros(len(given))

    grown: list[int] = []
    Watched().score(images=[image] * 40, batch_size=10, workers=1)
    assert len(prepared) == 40 and len(grown) == 4 and sum(grown) >= 2


def test_sizes_of_the_tiny_scorers_are_what_the_tests_say():
    assert tiny_scorer().prepare(pictures(1)[0]).shape == (3, SIZE, SIZE)


def test_a_new_user_is_taken_in_by_their_choices(tmp_path):
    """What they chose is what their scorer prefers more than the population does; the others' shares are untouched."""
    scorer = tiny_scorer(head="pal", settings={"users": 3, "prototypes": 4, "logit_scale": 3.0}, users=["a", "b", "c"])
    scorer.head.tastes.queries.bias.data.normal_(generator=torch.manual_seed(0))
    scorer.head.users.weight.data.normal_(generator=torch.manual_seed(1))
    chosen, rejected = pictures(6), pictures(6, seed=1)
    known = scorer.add_user("d", chosen=chosen, rejected=rejected, prompts="a thing", strength=0.1)
    before = scorer.compare(first=chosen, second=rejected, prompts="a thing")
    mine = known.for_user("d").compare(first=chosen, second=rejected, prompts="a thing")
    assert mine.log().sum() > before.log().sum() + 0.1
    assert scorer.users == ["a", "b", "c"] and known.users == ["a", "b", "c", "d"]
    known.save_pretrained(tmp_path / "known")
    again = PreferenceScorer.from_pretrained(tmp_path / "known", device="cpu").for_user("d")
    assert torch.allclose(again.compare(first=chosen, second=rejected, prompts="a thing"), mine, atol=1e-5)
    one = scorer.for_user("a").score(images=chosen, prompts="a thing")
    assert torch.equal(known.for_user("a").score(images=chosen, prompts="a thing"), one)


def test_users_that_cannot_be_taken_in_are_refused():
    shown = {"chosen": pictures(2), "rejected": pictures(2, seed=1), "prompts": "a thing"}
    with pytest.raises(ValueError, match="the scorer tiny knows no users; train one with head.name pal"):
        tiny_scorer().add_user("d", **shown)
    scorer = tiny_scorer(head="pal", settings={"users": 1}, users=["a"])
    with pytest.raises(ValueError, match="knows a user 'a' already"):
        scorer.add_user("a", **shown)
    with pytest.raises(ValueError, match="2 chosen pictures, 1 rejected ones and 2 prompts are no pairs"):
        scorer.add_user("d", **shown | {"rejected": pictures(1)})
