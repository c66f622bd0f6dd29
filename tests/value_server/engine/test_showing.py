"""What becomes of a row whose pictures are late, lost, of another number or not to be seen."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.seeing import Seer, digest, digests
from tests.support.tiny_vision import PLACEHOLDER
from value_server.contract.checkpoint import CheckpointError
from value_server.engine.cache import ACTIVE_S
from value_server.engine.engine import Engine
from value_server.engine.errors import BusyError
from value_server.engine.job import Job, Row
from value_server.engine.pictures import PictureStore
from value_server.engine.shown import Shown
from value_server.model.sight import Seen


@pytest.fixture(params=["llava", "qwen2.5-vl", "gemma3"])
def seer(request: pytest.FixtureRequest, tmp_path: Path) -> Seer:
    return Seer.of(request.param, tmp_path)


def ask(served: Engine, name: str, text: list[int], *numbers: int, start: int = 0) -> Row:
    row = Row(name, start, text, [1, 2], pictures=digests(list(numbers)))
    served.run(Job([row]))
    return row


def test_a_late_picture(seer: Seer) -> None:
    """Its row waits, its neighbour does not; when it is there, the values are right."""
    served, text = Engine(seer.value, slots=512), seer.text([0])
    seer_row = Row("a", 0, text, [1, 2], pictures=digests([0]))
    other = Row("b", 0, [5, 6], [1, 2])
    result = served.run(Job([seer_row, other]))
    assert (result.held, result.pending, result.refused) == ([0, 2], 1, {})
    assert np.isnan(seer_row.logits).all()
    assert np.isfinite(other.logits).all()
    assert served.showing
    assert served.showing.missing == 1
    seer.show(served, [0])
    row = ask(served, "a", text, 0)
    np.testing.assert_allclose(row.logits, [seer.z([*text, c], [0]) for c in (1, 2)], atol=1e-4)


def test_placeholders_and_pictures_that_do_not_fit(seer: Seer) -> None:
    served = Engine(seer.value, slots=512)
    seer.show(served, [0, 1])
    text = seer.text([0])
    assert "none of its 0" in str(ask(served, "a", text).refused)
    assert "none of its 0" in str(ask(served, "a", [5, PLACEHOLDER, 6]).refused)
    assert "none of its 1" in str(ask(served, "a", [*text, PLACEHOLDER, 7], 0).refused)
    fits = ask(served, "a", text, 0)
    assert np.isfinite(fits.logits).all()
    assert "none of its 1" in str(ask(served, "a", [PLACEHOLDER], start=len(text)).refused)
    assert np.isfinite(ask(served, "a", text, 0).logits).all()
    assert served.run(Job([Row("c", 0, [5], [PLACEHOLDER])])).pending == 0  # as any candidate


def test_a_text_with_too_few_placeholders_never_has_values(seer: Seer) -> None:
    served = Engine(seer.value, slots=512)
    seer.show(served, [0, 1])
    text = seer.text([0])
    assert np.isnan(ask(served, "a", text, 0, 1).logits).all()
    (place, *_), rows = np.flatnonzero(np.array(text) == PLACEHOLDER), seer.rows(0)
    fewer = text[:place] + text[place + 1 :]
    row = ask(served, "b", fewer, 0)
    assert np.isnan(row.logits).all()
    if seer.name != "llava":  # else there could be tiles, and more of them to come
        assert f"one has {rows} rows" in str(row.refused)
    row = Row("t", 0, fewer, pictures=digests([0]))
    served.run(Job([row], texts=True))
    assert "pictures" in str(row.refused)


def test_a_picture_that_cannot_be_seen(seer: Seer) -> None:
    served = Engine(seer.value, slots=512)
    assert served.showing
    served.showing.store.refuse(digest(0), "body: not a readable picture")
    row = ask(served, "a", seer.text([0]), 0)
    assert row.refused
    assert str(row.refused) == "pictures: one cannot be seen: body: not a readable picture"
    seer.show(served, [0])  # told again, it can
    assert np.isfinite(ask(served, "a", seer.text([0]), 0).logits).all()


def test_embeddings_that_went_are_not_missed_by_texts_that_have_their_slots(seer: Seer) -> None:
    served = Engine(seer.value, slots=512)
    seer.show(served, [0])
    assert served.showing
    store, text = served.showing.store, seer.text([0])
    ask(served, "a", text, 0)
    store.most_bytes = store.bytes
    seer.show(served, [3])
    assert (len(store), store.has(digest(0)), store.has(digest(3))) == (1, False, True)
    row = ask(served, "b", text, 0)
    np.testing.assert_allclose(row.logits, [seer.z([*text, c], [0]) for c in (1, 2)], atol=1e-4)
    served.run(Job([], closed=["a", "b"]))
    served.cache.forget_kept()
    assert ask(served, "b", text, 0).held == 0  # it is to be computed anew
    seer.show(served, [0])
    assert np.isfinite(ask(served, "b", text, 0).logits).all()


def test_the_store_holds_so_many_bytes() -> None:
    store = PictureStore(4 * 8 * 3)
    for number in range(5):
        store.add(str(number), Seen(torch.full((4, 2), float(number)), torch.zeros(0, 4, 2)))
        store.find("0")
    assert [store.has(str(number)) for number in range(5)] == [True, False, False, True, True]
    assert store.bytes == store.most_bytes
    tokens = [picture.token for n in range(5) if (picture := store.find(str(n)))]
    assert len(set(tokens)) == 5
    assert max(tokens) < 0
    with pytest.raises(ValueError, match="100 bytes, at most 96"):
        store.add("large", Seen(torch.zeros(25, 1)))


def test_what_a_text_needs_stays_until_it_is_computed(seer: Seer) -> None:
    """Also where another step takes its place before that."""
    served, text = Engine(seer.value, slots=512), seer.text([0])
    seer.show(served, [0])
    assert served.showing
    store = served.showing.store
    store.most_bytes = store.bytes
    first = Job([Row("a", 0, text, [1], pictures=digests([0]))])
    served.admit(first)
    with pytest.raises(BusyError, match=f"need {store.bytes} bytes of pictures"):
        seer.show(served, [3])
    served.drop(first, {"a"})
    row = ask(served, "a", [2], start=len(text))
    expected = [seer.z([*text, 2, c], [0]) for c in (1, 2)]
    np.testing.assert_allclose(row.logits, expected, atol=1e-4)
    seer.show(served, [3])
    assert (store.has(digest(0)), store.has(digest(3))) == (False, True)
    assert served.showing.missing == 0


def test_what_the_rest_of_a_text_needs_stays(seer: Seer) -> None:
    """A text that is told in pieces has all pictures from its first piece on, or none of it."""
    served, text = Engine(seer.value, slots=512), seer.text([0, 3])
    seer.show(served, [0, 3])
    assert served.showing
    store, places = served.showing.store, np.flatnonzero(np.array(text) == PLACEHOLDER)
    cut = int(places[seer.rows(0)])  # before the second one
    store.most_bytes = store.bytes
    assert ask(served, "a", text[:cut], 0, 3).held == cut
    with pytest.raises(BusyError):
        seer.show(served, [6])  # whose size is the same
    row = ask(served, "a", text[cut:], start=cut)
    np.testing.assert_allclose(row.logits, [seer.z([*text, c], [0, 3]) for c in (1, 2)], atol=1e-4)
    seer.show(served, [6])
    assert [store.has(digest(n)) for n in (0, 3, 6)] == [False, True, True]
    assert ask(served, "b", text[:2], 3, 0).held == 0  # before its pictures, and one is missing


def test_an_idle_text_keeps_no_picture(seer: Seer) -> None:
    """Its client may never come back."""
    now = [0.0]
    served, text = Engine(seer.value, slots=512, now=lambda: now[0]), seer.text([0])
    seer.show(served, [0])
    assert served.showing
    store = served.showing.store
    store.most_bytes = store.bytes
    assert ask(served, "a", text[:1], 0).held == 1
    now[0] += ACTIVE_S + 1
    served.cache.expire()
    seer.show(served, [3])
    assert ask(served, "a", text[1:], start=1).held == 0


@pytest.mark.parametrize("broken", ["rows", "blocks", "positions"])
def test_pictures_that_are_served_otherwise_are_found_out(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seer = Seer.of("qwen2.5-vl" if broken == "positions" else "gemma3", tmp_path)
    served = Engine(seer.value, slots=512)
    if broken == "rows":
        monkeypatch.setattr("value_server.engine.showing._joined", lambda *_: torch.zeros(16, 32))
    elif broken == "blocks":
        monkeypatch.setattr(Shown, "blocks", lambda *_: ())
    else:
        monkeypatch.setattr(Shown, "positions_at", lambda _, places: places[None])
    with pytest.raises(CheckpointError, match="with a picture its hidden states differ"):
        served.warm_up()


def test_warm_up_leaves_no_picture_behind(seer: Seer) -> None:
    served = Engine(seer.value, slots=512)
    served.warm_up()
    assert served.showing
    assert (len(served.showing.store), served.showing.store.bytes) == (0, 0)
    assert (served.forwarded, served.cache.used, served.showing.missing) == (0, 0, 0)
