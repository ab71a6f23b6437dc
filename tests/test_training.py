"""The loop: loss, step, schedule, averaged weights, reproducibility."""

import math

import pytest
import torch

from batches import TrainingBatches
from common import MedFLError
from dataset import load_dataset
from evaluation.scoring import score_patients
from inference import predict_volume, to_mask
from training import Learner, TrainingSettings, choose_precision, rate_scale, segmentation_loss
from transunet import TransUNet

CPU = torch.device("cpu")


def learner(**settings) -> Learner:
    given = TrainingSettings(**{"image_size": 32, "batch_size": 4, "precision": "float32", **settings})
    torch.manual_seed(given.seed)
    return Learner(TransUNet(given.model, given.image_size, given.norm), given, CPU)


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    masks = torch.zeros(4, 1, 32, 32)
    masks[:2, :, 8:20, 10:24] = 1
    return torch.randn(4, 3, 32, 32, generator=random) + 2 * masks, masks


def test_loss_of_hand_counted_logits():
    logits = torch.tensor([[[[0.0, 100.0]]]])
    loss, dice = segmentation_loss(logits, torch.tensor([[[[0.0, 1.0]]]]))
    assert dice.item() == pytest.approx((2 * 1 + 1) / (1.5 + 1 + 1))
    assert loss.item() == pytest.approx(math.log(2) / 2 + 1 - dice.item())


def test_an_empty_slice_adds_nothing_to_the_dice_of_a_batch():
    logits, masks = torch.full((1, 1, 8, 8), 30.0), torch.ones(1, 1, 8, 8)
    alone = segmentation_loss(logits, masks)[1]
    both = segmentation_loss(
        torch.cat([logits, torch.full_like(logits, -60)]), torch.cat([masks, torch.zeros_like(masks)])
    )[1]
    assert both.item() == pytest.approx(alone.item())


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_overfits_two_batches(norm):
    subject = learner(norm=norm, ema_decay=0.0, lr=2e-3)
    for _ in range(40):
        result = subject.train_epoch([batch(0), batch(1)])
    assert result.dice > 0.9


def test_rate_warms_up_over_a_share_of_the_run_and_falls_to_a_hundredth():
    assert rate_scale(0.0, 0.1) == pytest.approx(0.01) and rate_scale(0.0, 0.0) == 1
    assert rate_scale(0.1, 0.1) == rate_scale(0.1, 0.0) and rate_scale(0.05, 0.1) == pytest.approx(
        0.505 * rate_scale(0.05, 0.0)
    )
    assert rate_scale(0.5, 0.1) == pytest.approx(0.505)
    assert rate_scale(1.0, 0.1) == pytest.approx(0.01) == rate_scale(1.7, 0.1)


def test_a_warm_up_longer_than_half_of_the_run_is_refused():
    for wrong in (-0.1, 0.6, 100, float("nan")):
        with pytest.raises(MedFLError, match="--warmup"):
            TrainingSettings(warmup=wrong)


def test_encoder_and_decoder_have_their_own_rates():
    subject = learner(lr=0.01, encoder_lr_factor=0.1)
    subject.set_rate(0.5)
    rates = {
        id(weight): group["lr"] for group in subject.optimiser.param_groups for weight in group["params"]
    }
    named = dict(subject.model.named_parameters())
    assert rates.keys() == {id(weight) for weight in named.values()}
    assert all(
        rates[id(weight)] == pytest.approx(0.0005 if name.startswith("encoder.") else 0.005)
        for name, weight in named.items()
    )


@pytest.mark.parametrize("decay", [0.05, 0.0])
def test_biases_norms_and_position_embeddings_do_not_decay(decay):
    subject = learner(weight_decay=decay)
    decays = {
        id(weight): group["weight_decay"]
        for group in subject.optimiser.param_groups
        for weight in group["params"]
    }
    still = {name for name, weight in subject.model.named_parameters() if not decays[id(weight)]}
    assert {
        "encoder.pos_embed",
        "encoder.cls_token",
        "encoder.norm.weight",
        "head.bias",
        "pyramid.stages.0.0.1.weight",
    } <= still
    assert ("head.weight" in still) == (decay == 0) == ("encoder.blocks.0.attn.qkv.weight" in still)


def test_a_frozen_encoder_keeps_its_weights():
    subject = learner()
    subject.model.set_encoder_trainable(False)
    before = {n: p.clone() for n, p in subject.model.named_parameters()}
    subject.train_epoch([batch()])
    for name, value in subject.model.named_parameters():
        assert torch.equal(value, before[name]) == name.startswith("encoder."), name


def test_average_follows_its_definition():
    """The first step copies, the second mixes with decay (1 + 1) / (10 + 1)."""
    subject = learner()
    subject.train_epoch([batch(0)])
    first = subject.model.head.weight.clone()
    assert torch.equal(subject.weights_model.head.weight, first)
    subject.train_epoch([batch(1)])
    wanted = first + (subject.model.head.weight - first) * (1 - 2 / 11)
    torch.testing.assert_close(subject.weights_model.head.weight, wanted)
    counter = [n for n in subject.model.state_dict() if n.endswith("num_batches_tracked")][0]
    assert subject.weights_model.state_dict()[counter] == 2


def test_clipping_bounds_the_gradient():
    subject = learner(clip=1e-3)
    subject.train_epoch([batch()])
    norm = torch.stack([p.grad.norm() for p in subject.model.parameters()]).norm()
    assert norm <= 1e-3 * 1.01


def test_a_loss_that_is_not_finite_stops_with_a_sentence():
    images, masks = batch()
    images[0, 0, 0, 0] = float("nan")
    with pytest.raises(MedFLError, match="lower --lr"):
        learner().train_epoch([(images, masks)])


def test_state_goes_on_bit_for_bit():
    whole, halves = learner(), learner()
    whole.train_epoch([batch(0), batch(1), batch(2)])
    halves.train_epoch([batch(0)])
    again = learner(seed=5)
    again.load_state_dict(halves.state_dict())
    again.train_epoch([batch(1), batch(2)])
    for name, value in whole.weights_model.state_dict().items():
        assert torch.equal(value, again.weights_model.state_dict()[name]), name


def test_same_seed_same_weights_on_phantoms(phantoms):
    dataset = load_dataset(phantoms, progress=False)
    patients = tuple(p.name for p in dataset.patients[:3])
    runs = []
    for seed in (0, 0, 1):
        subject = learner(seed=seed)
        subject.train_epoch(TrainingBatches(dataset, patients, 32, 4, seed).epoch(1))
        runs.append(subject.model.head.weight)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_scores_are_of_the_masks_that_inference_gives(phantoms):
    dataset = load_dataset(phantoms, progress=False)
    model, patient = learner().model, dataset.patients[0].name
    row = score_patients(model, dataset, [patient], 0.5)[0]
    volume, truth = dataset.volume(patient)
    mask = to_mask(predict_volume(model, volume), 0.5)
    assert mask.shape == truth.shape and set(mask.flat) <= {0, 255}
    assert row["tp"] == int(((mask > 0) & (truth > 0)).sum())


def test_precision_is_what_the_chip_reports():
    has_units = torch.cpu.get_capabilities().get("amx_bf16", False)
    assert choose_precision("auto", CPU) == (torch.bfloat16 if has_units else torch.float32)
    assert choose_precision("bfloat16", CPU) == torch.bfloat16


def test_bfloat16_trains():
    subject = learner(precision="bfloat16", ema_decay=0.0, lr=2e-3)
    for _ in range(30):
        result = subject.train_epoch([batch()])
    assert result.dice > 0.7 and subject.model.head.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "settings",
    [
        {"minutes": 0.0},
        {"epochs": 0},
        {"batch_size": 0},
        {"seed": -1},
        {"lr": float("nan")},
        {"clip": 0.0},
        {"encoder_lr_factor": 0.0},
        {"ema_decay": 1.0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(MedFLError, match="--" + next(iter(settings)).replace("_", "-")):
        TrainingSettings(**settings)


def test_an_epochs_result_is_the_mean_over_its_steps():
    one = learner()
    alone = [one.train_epoch([batch(k)]) for k in (0, 1)]
    both = learner().train_epoch([batch(0), batch(1)])
    assert both.steps == 2
    assert both.loss == pytest.approx(sum(r.loss for r in alone) / 2) and both.dice == pytest.approx(
        sum(r.dice for r in alone) / 2
    )


def test_before_step_may_end_the_pass():
    subject = learner()
    assert subject.train_epoch([batch()] * 3, lambda step: step < 1).steps == 1 == subject.step_count


def test_weight_decay_is_the_settings():
    assert {g["weight_decay"] for g in learner(weight_decay=0.3).optimiser.param_groups} == {0.3, 0.0}


def test_the_state_holds_steps_and_precision():
    first, again = learner(precision="bfloat16"), learner()
    first.train_epoch([batch()])
    again.load_state_dict(first.state_dict())
    assert (again.step_count, again.precision) == (1, torch.bfloat16)


def test_statistics_of_the_normalisation_are_averaged_as_well():
    subject = learner()
    name = next(n for n in subject.model.state_dict() if n.endswith("running_mean"))
    subject.train_epoch([batch(0)])
    first = subject.model.state_dict()[name].clone()
    subject.train_epoch([batch(1)])
    wanted = first + (subject.model.state_dict()[name] - first) * (1 - 2 / 11)
    torch.testing.assert_close(subject.weights_model.state_dict()[name], wanted)


def test_scores_follow_the_threshold(phantoms):
    dataset = load_dataset(phantoms, progress=False)
    patient = dataset.patients[0].name
    row = score_patients(learner().model, dataset, [patient], 0.0)[0]  # every pixel reaches it
    truth = dataset.volume(patient)[1]
    assert (row["tp"], row["fp"]) == ((truth > 0).sum(), (truth == 0).sum())
