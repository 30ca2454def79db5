import pytest
import torch

from lapa.backbones.base import LATENT_ACTION, attention_mask
from lapa.latent_vla.heads import UNKNOWN, BinnedActionHead, ChunkActionHead, LatentHead, build_action_head
from lapa.latent_vla.model import ActionModel, LatentActionModel, VisionLanguageTrunk
from lapa.schema import DenseBackbone, WordText
from lapa.text import encode_text

CODE_LENGTH, CODEBOOK_SIZE = 3, 5
TEXTS = ["go to the red moon", "reach the blue cube", "touch the star", "go"]


def new_trunk(image_tokenizer: str = "keypoints") -> VisionLanguageTrunk:
    torch.manual_seed(0)
    return VisionLanguageTrunk(DenseBackbone(width=32, num_layers=2), WordText(max_words=6), image_tokenizer, 32)


def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(4, 3, 32, 32, generator=generator)
    latent = torch.randint(CODEBOOK_SIZE, (4, CODE_LENGTH), generator=generator)
    return images, encode_text(TEXTS, 6), latent


def test_prefix_sees_both_ways_actions_causally_and_nobody_padding():
    trunk = new_trunk()
    _, prefix = trunk.prefix(torch.rand(2, 3, 32, 32), encode_text(["go now", "go"], 6))
    layout = prefix[1:, [0, 1, 2, 3]]
    layout = layout.then(trunk.action_layout(layout, torch.zeros(1, 2, 32), LATENT_ACTION))
    mask = attention_mask(layout, layout, trunk.backbone.mask)[0].int().tolist()
    assert mask == [
        [1, 0, 1, 1, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [1, 0, 1, 1, 0, 0],
        [1, 0, 1, 1, 0, 0],
        [1, 0, 1, 1, 1, 0],
        [1, 0, 1, 1, 1, 1],
    ]


def test_a_latent_token_does_not_change_what_is_predicted_before_it():
    model = LatentActionModel(new_trunk(), CODE_LENGTH, CODEBOOK_SIZE).eval()
    images, words, latent = batch()
    changed = latent.clone()
    changed[:, 1] = (changed[:, 1] + 1) % CODEBOOK_SIZE
    before, after = model.hidden(images, words, latent[:, :2]), model.hidden(images, words, changed[:, :2])
    assert torch.allclose(before[:, :2], after[:, :2], atol=1e-6)
    assert not torch.allclose(before[:, 2], after[:, 2], atol=1e-3)


def test_padding_and_other_samples_do_not_change_a_sample():
    model = ActionModel(new_trunk(), ChunkActionHead(32, 2, 2)).eval()
    images, words, _ = batch()
    alone = model.decode(images[1:2], words[1:2])
    assert torch.allclose(model.decode(images, words)[1:2], alone, atol=1e-5)


def test_an_empty_instruction_is_bearable():
    model = ActionModel(new_trunk(), ChunkActionHead(32, 2, 2))
    assert model.decode(torch.rand(1, 3, 32, 32), encode_text([""], 6)).isfinite().all()


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"expected \(B, 3, 32, 32\)"):
        new_trunk()(torch.rand(1, 3, 64, 64), encode_text(["go"], 6), torch.zeros(1, 1, 32), LATENT_ACTION)


@pytest.mark.parametrize("image_tokenizer", ["keypoints", "grid"])
def test_latent_model_overfits_one_batch_and_generates_it(image_tokenizer):
    model = LatentActionModel(new_trunk(image_tokenizer), CODE_LENGTH, CODEBOOK_SIZE)
    images, words, latent = batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        loss, _ = model.loss(images, words, latent[:, None])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2
    assert torch.equal(model.generate(images, words), latent)


@pytest.mark.parametrize("head_name", ["chunk", "bins"])
def test_action_model_overfits_one_batch(head_name):
    head = build_action_head(head_name, 32, chunk_size=2, action_dim=2, num_bins=16)
    actions, is_pad = torch.randn(4, 2, 2), torch.zeros(4, 2, dtype=torch.bool)
    is_pad[0, 1] = True
    if head_name == "bins":
        head.fit_bins(actions.flatten(0, 1))
    model = ActionModel(new_trunk(), head)
    images, words, _ = batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model.loss(images, words, actions, is_pad)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    error = (model.decode(images, words) - actions).abs()[~is_pad]
    assert error.mean() < 0.25


def test_latent_head_starts_near_a_uniform_guess():
    head = LatentHead(32, CODE_LENGTH, CODEBOOK_SIZE)
    latent = torch.randint(CODEBOOK_SIZE, (64, 1, CODE_LENGTH))
    loss, numbers = head.loss(torch.randn(64, CODE_LENGTH, 32) * 0.1, latent)
    assert numbers["token_cross_entropy"] == pytest.approx(torch.log(torch.tensor(5.0)).item(), abs=0.1)
    assert loss.requires_grad


def test_the_readout_tells_a_chunk_of_latent_actions_and_nothing_of_unknown_ones():
    head = LatentHead(32, CODE_LENGTH, CODEBOOK_SIZE, chunk_size=3)
    hidden = torch.randn(4, CODE_LENGTH, 32)
    latent = torch.randint(CODEBOOK_SIZE, (4, 3, CODE_LENGTH))
    latent[0, 1:] = latent[1, 2] = UNKNOWN
    entropy = head.readout_cross_entropy(hidden[:, 0], latent)
    assert torch.equal(entropy == 0, latent == UNKNOWN)
    logits = head.at_once(hidden[2, 0]).view(3, CODE_LENGTH, CODEBOOK_SIZE)
    assert entropy[2, 1, 1].item() == pytest.approx(-logits[1, 1].log_softmax(0)[latent[2, 1, 1]].item(), abs=1e-5)
    loss, numbers = head.loss(hidden, latent)
    expected = entropy[latent != UNKNOWN].mean()
    torch.testing.assert_close(loss - numbers["token_cross_entropy"], expected)


def test_padded_actions_give_no_loss_and_no_gradient():
    head = ChunkActionHead(8, 3, 2)
    hidden = torch.randn(2, 8)
    actions = torch.randn(2, 3, 2)
    is_pad = torch.tensor([[False, False, True], [False, True, True]])
    far = torch.where(is_pad[..., None], 1e6, actions)
    assert torch.equal(head.loss(hidden, actions, is_pad)[0], head.loss(hidden, far, is_pad)[0])


class TestBins:
    def fitted(self, actions: torch.Tensor, num_bins: int = 8) -> BinnedActionHead:
        head = BinnedActionHead(8, chunk_size=1, action_dim=actions.shape[1], num_bins=num_bins)
        head.fit_bins(actions)
        return head

    def test_round_trip_is_within_the_bin(self):
        actions = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
        head = self.fitted(actions, num_bins=64)
        bins = head.encode(actions[:, None])
        back = head.midpoints(bins)[:, 0]
        for dim in range(2):
            index = bins[:, 0, dim]
            width = head.edges_AN[dim, index + 1] - head.edges_AN[dim, index]
            assert ((back[:, dim] - actions[:, dim]).abs() <= width / 2 + 1e-5).all()

    def test_bins_hold_equal_counts(self):
        actions = torch.randn(800, 1, generator=torch.Generator().manual_seed(0)) ** 3
        counts = self.fitted(actions).encode(actions[:, None]).flatten().bincount(minlength=8)
        assert (counts - 100).abs().max() <= 1

    def test_duplicate_edges_are_dropped_and_never_predicted(self):
        actions = torch.cat([torch.zeros(90, 1), torch.linspace(1, 2, 10)[:, None]])
        head = self.fitted(actions)
        num_bins = int(head.num_bins_A[0])
        assert num_bins < 8
        assert head(torch.randn(3, 8))[..., num_bins:].eq(-torch.inf).all()
        loss, _ = head.loss(torch.randn(10, 8), actions[-10:, None], torch.zeros(10, 1, dtype=torch.bool))
        assert loss.isfinite().all()

    def test_actions_out_of_range_go_to_the_nearest_bin(self):
        head = self.fitted(torch.linspace(-1, 1, 100)[:, None])
        assert head.encode(torch.tensor([[[-9.0]], [[9.0]]])).flatten().tolist() == [0, 7]

    def test_a_constant_action_decodes_to_itself(self):
        head = self.fitted(torch.full((20, 1), 0.3))
        assert head.decode(torch.randn(2, 8)).flatten().tolist() == pytest.approx([0.3, 0.3])

    def test_without_edges_it_says_what_to_do(self):
        with pytest.raises(ValueError, match="no bin edges"):
            BinnedActionHead(8, 1, 2, 8).decode(torch.randn(1, 8))

    def test_wrong_actions_are_refused(self):
        with pytest.raises(ValueError, match=r"actions \(N, 2\), got \(5, 3\)"):
            BinnedActionHead(8, 1, 2, 8).fit_bins(torch.zeros(5, 3))


def test_an_unknown_head_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown action_head 'gauss'.*bins.*chunk"):
        build_action_head("gauss", 8, 1, 2, 8)
