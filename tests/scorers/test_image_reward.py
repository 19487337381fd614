"""ImageReward on tiny weights in the published layout. The expected figures were computed by the authors' own code
(image-reward 1.5, its BLIP classes and head) from these weights, pixels and ids."""

import math
import zlib

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessor

from unidiff.rewards.segment_view import SegmentView, link_row
from unidiff.scorers.image_reward import ImageRewardModel, image_reward
from unidiff.sequence import Modality

GOLDEN = [-0.6961061954, -0.5417585969, -0.6343625188]
VISION, TEXT, PATCH, SIZE = 128, 64, 16, 64  # widths; pixels
IDS = torch.arange(27).reshape(3, 9) % 23
ATTENDED = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] * 7 + [0] * 2])


def noise(name, *shape):
    """Numbers from -0.5 to 0.5 that depend on a name and a place alone, so that other code can make them as well."""
    places = torch.arange(math.prod(shape), dtype=torch.float64) + zlib.crc32(name.encode()) % 1000
    return ((torch.sin(places * 12.9898) * 43758.5453).remainder(1) - 0.5).float().reshape(shape)


def published():
    """Tiny weights under the names, and in the shapes, of ImageReward.pt."""
    shapes = {"cls_token": (1, 1, VISION), "pos_embed": (1, 1 + (SIZE // PATCH) ** 2, VISION)}
    shapes |= {"patch_embed.proj.weight": (VISION, 3, PATCH, PATCH), "patch_embed.proj.bias": (VISION,)}
    norms = {"norm": VISION}
    linears = {}
    for i in range(2):
        norms |= {f"blocks.{i}.norm1": VISION, f"blocks.{i}.norm2": VISION}
        linears |= {f"blocks.{i}.attn.qkv": (3 * VISION, VISION), f"blocks.{i}.attn.proj": (VISION, VISION)}
        linears |= {f"blocks.{i}.mlp.fc1": (4 * VISION, VISION), f"blocks.{i}.mlp.fc2": (VISION, 4 * VISION)}
    state = sized("blip.visual_encoder.", shapes, norms, linears)
    shapes = {"embeddings.word_embeddings.weight": (100, TEXT), "embeddings.position_embeddings.weight": (40, TEXT)}
    norms, linears = {"embeddings.LayerNorm": TEXT}, {}
    for i in range(2):
        layer = f"encoder.layer.{i}"
        for kind, width in (("attention", TEXT), ("crossattention", VISION)):
            linears |= {f"{layer}.{kind}.self.{n}": (TEXT, width) for n in ("key", "value")}
            linears |= {f"{layer}.{kind}.self.query": (TEXT, TEXT), f"{layer}.{kind}.output.dense": (TEXT, TEXT)}
            norms[f"{layer}.{kind}.output.LayerNorm"] = TEXT
        linears |= {f"{layer}.intermediate.dense": (96, TEXT), f"{layer}.output.dense": (TEXT, 96)}
        norms[f"{layer}.output.LayerNorm"] = TEXT
    state |= sized("blip.text_encoder.", shapes, norms, linears)
    widths = {0: (24, TEXT), 2: (16, 24), 4: (8, 16), 6: (4, 8), 7: (1, 4)}
    state |= sized("mlp.", {}, {}, {f"layers.{n}": shape for n, shape in widths.items()})
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    state["blip.vision_proj.weight"] = torch.zeros(8, VISION)  # in the file, and not in use
    return state


def sized(prefix, shapes, norms, linears):
    for name, width in norms.items():
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {prefix + name: noise(prefix + name, *shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    """(the weights' file, the tokenizer's folder)"""
    folder = tmp_path_factory.mktemp("image_reward")
    torch.save(published(), folder / "ImageReward.pt")
    tokenizer.save_pretrained(folder)
    return str(folder / "ImageReward.pt"), str(folder)


def test_the_authors_figures():
    pixels = 5 * noise("pixels", 3, 3, SIZE, SIZE)
    with torch.no_grad():
        figures = ImageRewardModel(published()).eval()(pixels, IDS, ATTENDED)
    assert figures.tolist() == pytest.approx(GOLDEN, abs=1e-5) and figures.std() > 1e-3


def test_pictures_and_texts(checkpoint, tokenizer):
    path, folder = checkpoint
    rng = np.random.default_rng(0)
    views = []
    for words in ("find the goal", "go right", "find a safe way to the goal"):
        pixels = rng.integers(0, 256, (90, 70, 3), dtype=np.uint8)
        one = SegmentView(modality=Modality.IMAGE, tokens=torch.arange(4), pixels=pixels)
        views += link_row([one], prompt=[words], columns={"caption": "go left"})
    prepare = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    model = ImageRewardModel(published()).eval()

    def by_hand(texts):
        figures = []
        for view, words in zip(views, texts):
            ids = torch.tensor([tokenizer(words)["input_ids"]])
            pixels = prepare(images=view.image, return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                figures.append(model(pixels, ids, torch.ones_like(ids)).item())
        return pytest.approx(figures, abs=1e-4)

    first = [view.prompt[0] for view in views]
    score = image_reward(path, tokenizer=folder, weight=0.5)
    assert (score.name, score.on, score.weight) == ("image_reward", "image", 0.5)
    assert score(views) == by_hand(first)
    assert image_reward(path, tokenizer=folder, loading={"batch": 2})(views) == by_hand(first)
    assert image_reward(path, tokenizer=folder, column="caption")(views) == by_hand(["go left"] * 3)


def test_loading_moves_no_random_state(checkpoint, rng_untouched):
    path, folder = checkpoint
    pixels = np.zeros((64, 64, 3), np.uint8)
    one = SegmentView(modality=Modality.IMAGE, tokens=torch.arange(4), pixels=pixels, prompt=["go"])
    assert len(image_reward(path, tokenizer=folder)([one])) == 1


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"download ImageReward\.pt of THUDM/ImageReward"):
        image_reward(str(tmp_path / "nothing.pt"))
    with pytest.raises(ValueError, match="it is not an ImageReward"):
        ImageRewardModel({"layers.0.weight": torch.ones(1, 4)})
    state = published()
    del state["blip.visual_encoder.norm.weight"]
    state["blip.visual_encoder.fc_norm.weight"] = torch.ones(VISION)
    with pytest.raises(ValueError, match=r"lacks \['post_layernorm.weight'\] and has unknown \['fc_norm.weight'\]"):
        ImageRewardModel(state)
