"""Tests the notes that a run prints about valid settings that are probably mistakes."""

import dataclasses

import pytest

from tests.helpers import adversarial, runs, tiny
from varjax.errors import InputError
from varjax.mar.sample import MAROptions
from varjax.mar.task import MARTask
from varjax.tokenizers.kl.task import KLTask
from varjax.training.setup import passes_notes, set_up
from varjax.training.task import Plan
from varjax.var.sample import VAROptions
from varjax.var.task import VARTask

PLAN = Plan(steps=10_000)
VAR = VARTask(runs.VAR, runs.TOKENIZER, "random")
MAR = MARTask(runs.MAR, runs.KL, "random", ema_decay=0.999, sampling=MAROptions(steps=2))


@pytest.mark.parametrize(
    ("task", "guided"),
    [(VAR, VAROptions(guidance=1.5)), (MAR, MAROptions(guidance=1.5, steps=2))],
    ids=["VAR", "MAR"],
)
def test_a_note_warns_of_guidance_without_class_dropout(task, guided):
    unguided = dataclasses.replace(guided, guidance=1.0)
    for dropout, sampling, said in (
        (0.1, guided, False),
        (0.0, unguided, False),
        (0.0, guided, True),
    ):
        changed = dataclasses.replace(task, class_dropout=dropout, sampling=sampling)
        notes = changed.notes(PLAN)
        assert len(notes) == said
        if said:
            assert "class_dropout is 0, but sampling.guidance is 1.5" in notes[0]
            assert "task.sampling.guidance=1 for no guidance" in notes[0]
    (note,) = dataclasses.replace(task, class_dropout=1.0, sampling=unguided).notes(PLAN)
    assert "none of the 10 classes is trained" in note


@pytest.mark.parametrize("task", [VAR, MAR, KLTask(runs.KL), adversarial.TASK])
def test_a_note_warns_of_a_run_too_short_for_its_ema_decay(task):
    (note,) = dataclasses.replace(task, ema_decay=0.9999).notes(Plan(steps=1000))
    assert (
        "90% of the EMA weights are still the initial parameters" in note
        and "task.ema_decay=0.995" in note
    )
    assert "Set task.ema_warmup=true or" in note
    warmed_up = dataclasses.replace(task, ema_decay=0.9999, ema_warmup=True)
    assert not warmed_up.notes(Plan(steps=1000))
    for ema, steps in ((0.9999, 40_000), (0.995, 1000), (0.0, 1)):
        assert not dataclasses.replace(task, ema_decay=ema).notes(Plan(steps=steps))


def test_notes_are_printed_before_anything_is_written(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tiny.Tiny, "notes", lambda task, plan: [f"{plan.steps} steps"])
    set_up(tiny.experiment(tmp_path / "run"))
    assert capfd.readouterr().err == "note: 30 steps\n"
    assert not (tmp_path / "run").exists()


def test_a_note_warns_of_hundreds_of_epochs_on_few_images():
    (note,) = passes_notes(Plan(steps=10_000, batch_size=64), 1_442)
    assert note.startswith("the run has 444 epochs of 1,442 training images, so the model may")
    assert note.endswith("50 epochs are 1,127 steps") and "eval_every=500 " in note
    assert "keep_best=eval/loss " in note
    (note,) = passes_notes(Plan(steps=400, batch_size=64), 20, ema=True)
    assert "keep_best=eval_ema/loss " in note
    assert "eval_every=40 " in note  # ten evaluations
    # By the other losses, the best weights would be from before the discriminator's start.
    (note,) = passes_notes(Plan(steps=10_000, batch_size=64), 1_442, adversarial=True)
    assert "keep_best" not in note and "eval_every=500. 50 epochs" in note
    for steps, images in ((4_000, 1_442), (250_000, 1_281_167), (10_000, 60_000)):
        assert (
            passes_notes(Plan(steps=steps, batch_size=1024 if steps == 250_000 else 64), images)
            == []
        )


def test_a_run_prints_the_note_on_epochs_unless_patience_ends_it(tmp_path, capfd):
    set_up(tiny.experiment(tmp_path, steps=5_000))
    said = capfd.readouterr().err
    assert said.startswith("note: the run has 222 epochs of 1,442 training")
    assert "keep_best=eval_ema/loss " in said
    limited = dict(eval_every=500, keep_best="eval_ema/loss", patience=5)
    set_up(tiny.experiment(tmp_path, steps=5_000, **limited))
    assert not capfd.readouterr().err


def test_eval_images_reaches_the_loader(tmp_path):
    assert set_up(tiny.experiment(tmp_path, eval_images=7)).loader.held_out_images == 7


def test_a_drop_path_of_one_is_refused():
    """It would divide by zero."""
    with pytest.raises(InputError, match="drop_path=1.0: must be at least 0 and below 1"):
        dataclasses.replace(VAR, drop_path=1.0)
