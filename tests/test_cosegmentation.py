"""Co-segmentation across modules: from a file of weights to a table, no hidden randomness, matches that do not depend on numbering, and its cost."""
import time

import numpy as np
import pytest
import torch

from anatcxr.data.manifest import ChestXrays
from anatcxr.data.table import shared_data
from anatcxr.explain.best_match import OrganSet, best_match, half_of, match_table, organ_set, overlaps
from anatcxr.explain.cosegmentation import border_saliency, brightness_maps, class_attention, coordinate_maps, cosegment
from anatcxr.explain.correspondence import TokenMaps
from anatcxr.explain.descriptors import descriptors
from anatcxr.models.backbones import Preprocess, create_backbone
from anatcxr.train.record import export_encoder, load_encoder


@pytest.fixture(scope="module")
def organs() -> OrganSet:
    return organ_set(ChestXrays("phantom:16", 64), n=12)


def made_up(seed: int, k: int = 6) -> tuple[torch.Tensor, OrganSet]:
    "Random blocks as segments and organs of 10 patients; one organ is sometimes absent."
    g = torch.Generator().manual_seed(seed)
    def blocks(top): return torch.randint(0, top, (10, 8, 8), generator=g).repeat_interleave(4, 1).repeat_interleave(4, 2)
    masks = {"a": blocks(3) == 0, "b": blocks(5) == 0, "c": (blocks(9) == 0) & (torch.rand(10, 1, 1, generator=g) < .7)}
    ids = torch.randint(0, 2 ** 40, (10,), generator=g)
    return blocks(k), OrganSet(torch.rand(10, 1, 32, 32, generator=g), masks, ids, [f"i{k}" for k in range(10)], [f"p{k}" for k in range(10)])


@pytest.mark.parametrize("seed", range(8))
def test_numbering_of_segments_does_not_matter(seed):
    labels, organs = made_up(seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    a, b = best_match(labels, organs), best_match(order[labels], organs)
    assert np.allclose(a[["single", "union"]], b[["single", "union"]])
    renamed = ["+".join(sorted(str(int(order[int(k)])) for k in s.split("+") if k)) for s in a.sets]
    assert renamed == ["+".join(sorted(s.split("+"))) for s in b.sets]


@pytest.mark.parametrize("seed", range(8))
def test_dice_follows_from_the_sets(seed):
    "And each half's sets are the best on the other half, of all that could be tried by adding or dropping one."
    labels, organs = made_up(seed, 5)
    cases, half = best_match(labels, organs).set_index(["id", "organ"]), half_of(organs.ids)
    def dice(found, true): return 1. if not (found | true).any() else (2 * (found & true).sum() / (found.sum() + true.sum())).item()
    for organ, masks in organs.masks.items():
        for here in (half, ~half):
            sets = {cases.sets[organs.keys[i], organ] for i in here.nonzero()[:, 0]}
            assert len(sets) == 1
            chosen = {int(k) for k in sets.pop().split("+") if k}
            def mean(s): return np.mean([dice(torch.isin(labels[i], torch.tensor([*s], dtype=torch.int64)), masks[i]) for i in (~here).nonzero()[:, 0]])
            assert mean(chosen) >= max(mean(chosen ^ {k}) for k in range(5)) - 1e-9
            for i in here.nonzero()[:, 0]:
                found = torch.isin(labels[i], torch.tensor([*chosen], dtype=torch.int64))
                assert cases.union[organs.keys[i], organ] == pytest.approx(dice(found, masks[i]))


def test_patients_of_the_other_half_alone_choose(organs):
    "Shuffled segments of the reported half change their Dice and not the choice."
    labels = cosegment(brightness_maps(organs.images, 16), k=6).at_pixels()
    half = half_of(organs.ids)
    mixed = labels.clone(); mixed[half] = mixed[half].flip(1)
    a, b = best_match(labels, organs), best_match(mixed, organs)
    reported = np.repeat(half.numpy(), 3)
    assert (a.sets[reported] == b.sets[reported]).all() and not np.allclose(a.union[reported], b.union[reported])


def test_overlaps_add_up(organs):
    labels = torch.randint(-1, 4, organs.images[:, 0].shape, generator=torch.Generator().manual_seed(0))
    o = overlaps(labels, organs.masks)
    none = torch.stack([((labels < 0) & m).sum((1, 2)) for m in organs.masks.values()], 1)
    assert torch.equal(o.both.sum(1) + none, o.true) and torch.equal(o.found.sum(1), (labels >= 0).sum((1, 2)).double())


def test_no_hidden_randomness(organs):
    maps = descriptors(create_backbone("micro_swin", 64, window_size=4).eval(), organs.images, lambda x: x - .5, stride=8)
    results = []
    for s in (0, 1):
        torch.manual_seed(s); np.random.seed(s)
        results.append(cosegment(maps, border_saliency(maps)))
    a, b = results
    assert torch.equal(a.distances, b.distances) and torch.equal(a.votes, b.votes)
    state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    cosegment(maps, k=5, seed=3)
    assert torch.equal(state[0], torch.random.get_rng_state()) and np.array_equal(state[1], np.random.get_state()[1])


def test_votes_need_enough_images():
    "Four images, two clusters; the lower one is salient in three of them and absent from none."
    xy, saliency = coordinate_maps(4, 32, 8).maps[0], torch.zeros(4, 8, 8)
    saliency[:3, 4:] = .1
    for share, salient in ((.75, [False, True]), (.8, [False, False]), (0., [True, True])):
        found = cosegment(TokenMaps((xy[:, 1:],), 32), saliency, k=2, share=share)
        assert found.votes.tolist() == [0, .75] and found.salient.tolist() == salient
    assert (found.labels[:, :4] == 0).all() and (found.labels[:, 4:] == 1).all()
    assert (found.at_pixels()[:, 0] == 0).all() and (found.at_pixels()[:, -1] == 1).all()


@pytest.mark.parametrize("backbone", ["micro_vit", "micro_swin"])
def test_from_a_file_of_weights_to_a_table(backbone, tmp_path):
    organs = organ_set(ChestXrays("phantom:16", 112), n=8)
    torch.manual_seed(0)
    export_encoder(tmp_path / "e.safetensors", create_backbone(backbone, 112), Preprocess(112), {"backbone": backbone})
    encoder, prepare = load_encoder(tmp_path / "e.safetensors")
    maps = descriptors(encoder, organs.images, prepare.normalise, facet="key", stride=8)
    saliency = {"border": border_saliency(maps)}
    if backbone == "micro_vit": saliency["class"] = class_attention(encoder, organs.images, prepare.normalise).repeat_interleave(2, 1).repeat_interleave(2, 2)
    segments = {name: cosegment(maps, s, k=6).at_pixels(salient_only=True) for name, s in saliency.items()}
    table = match_table(segments, organs, n=50)
    assert len(table) == 3 * (len(segments) + 1) and table.union.between(0, 1).all()
    assert not encoder.training


@pytest.mark.parametrize("backbone, facet", [("micro_swin", "token"), ("vit_small_patch16_224", "key")])
def test_thirty_real_images_in_a_minute_of_two_cores(backbone, facet):
    "Descriptors, elbow, votes and pixels; in seconds of the processor, since others may use it."
    if shared_data() is None: pytest.skip("no shared data: no real radiographs")
    organs = organ_set(ChestXrays(shared_data() / "manifest.csv", 224, "squash", rows="source == 'jsrt' and split != 'train'"), n=30)
    torch.manual_seed(0)
    encoder, start = create_backbone(backbone, 224), time.process_time()
    maps = descriptors(encoder, organs.images, Preprocess(224).normalise, facet=facet)
    found = cosegment(maps, border_saliency(maps))
    labels, seconds = found.at_pixels(), time.process_time() - start
    assert labels.shape == (30, 224, 224) and 2 <= len(found.salient) <= 14 and found.salient.any()
    print(f"{backbone}: {seconds:.0f} s, {len(found.salient)} clusters")
    assert seconds < 120
