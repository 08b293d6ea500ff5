"""The examples run, and do what they say."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def examples_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import examples as they import each other: from their own folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_demo_prints_its_tables_and_writes_its_figures(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"fit.png", "evaluations.png", "steps.png"}
    assert all(path.stat().st_size > 10_000 for path in tmp_path.iterdir())
    for word in ("DiscreteAdjoint", "BacksolveAdjoint", "InterpolatingAdjoint", "regularized"):
        assert word in done.stdout


def test_training_the_spiral_lowers_the_loss(examples_path: None) -> None:
    import spiral

    data = spiral.spiral_data()
    history = spiral.train(spiral.neural_spiral(data, seed=0, rtol=1e-4), data, iterations=20)
    assert history.loss[-1] < 0.6 * history.loss[0]
    assert len(history.forward_nf) == len(history.reverse_nf) == 20


def test_the_study_trains_every_regularizer_from_the_same_weights(examples_path: None) -> None:
    import regularized_spiral

    results = regularized_spiral.study(
        seeds=(0,), iterations=3, regularizers=tuple(regularized_spiral.REGULARIZERS)
    )
    assert set(results["ratios"]) == set(regularized_spiral.REGULARIZERS)
    first = {runs[0]["history"].loss[0] for runs in results["runs"].values()}
    assert len(first) == 1
    final = {runs[0]["loss"] for runs in results["runs"].values()}
    assert len(final) == len(results["runs"])  # every regularizer changes the training


def test_the_rates_of_rober_are_estimated_where_no_reverse_solve_is_unstable(
    tmp_path: Path,
) -> None:
    script = str(EXAMPLES / "rober_parameter_estimation.py")
    command = [sys.executable, script, "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rober.png").stat().st_size > 10_000
    first, second = done.stdout.split("2. Relative error")
    for name in ("DiscreteAdjoint", "DiscreteAdjoint, 16 checkpoints", "InterpolatingAdjoint"):
        row = next(line for line in first.splitlines() if line.startswith(name + "  "))
        off = row[len(name) :].split()[:3]
        assert all(abs(float(percent)) < 2.0 for percent in off)
    assert "Backward in time, what decays grows" in first
    assert "warns" in second
    assert second.splitlines()[-3].split()[-1] == "fails"  # over the whole interval


def test_the_stiff_neural_ode_learns_and_is_stiff(examples_path: None, tmp_path: Path) -> None:
    import stiff_neural_ode

    data = stiff_neural_ode.rober_data()
    model = stiff_neural_ode.ScaledNetwork(data, seed=0)
    stiff_neural_ode.pretrain(model, data, iterations=300)
    before = stiff_neural_ode.errors(model, data).square().mean()
    stiff_neural_ode.train(model, data, iterations=15)
    after = stiff_neural_ode.errors(model, data).square().mean()
    assert after < 0.8 * before
    assert after.sqrt() < 0.05
    sol = stiff_neural_ode.predict(model, data, data.t)
    assert (sol.steps.stiffness * sol.steps.h).sum() > 1e6
    stiff_neural_ode.draw(tmp_path / "stiff.png", data, data, model)
    assert (tmp_path / "stiff.png").stat().st_size > 10_000


def test_methods_for_sdes_converge_with_their_orders(examples_path: None, tmp_path: Path) -> None:
    import gbm

    prob = gbm.gbm()
    noise = gbm.solve(prob, gbm.EM(), dt=1 / gbm.FINEST, save_everystep=False, seed=0).noise
    fixed, adaptive = gbm.fixed_steps(prob, noise), gbm.adaptive(prob, noise)
    assert {c.name: c.order for c in fixed} == {"EM": 0.5, "RKMil": 1, "SRIW1": 1.5, "SOSRI": 1.5}
    for c in fixed:
        assert abs(c.slope - c.order) < 0.15, c
    for c in adaptive:
        assert abs(c.slope - c.order) < 0.15, c
    solver, closed = gbm.gradients(prob, noise)
    assert (solver - closed).abs().max() < 1e-3
    gbm.draw(tmp_path / "gbm.png", prob, noise, [*fixed, *adaptive])
    assert (tmp_path / "gbm.png").stat().st_size > 10_000


@pytest.mark.slow
def test_regularized_neural_sdes_need_fewer_evaluations(
    examples_path: None, tmp_path: Path
) -> None:
    import spiral_neural_sde

    results = spiral_neural_sde.study(seeds=(0,), iterations=40)
    assert set(results["ratios"]) == {"error", "stiffness"}
    runs = {name: found[0] for name, found in results["runs"].items()}
    assert len({run["history"].loss[0] for run in runs.values()}) == 1  # the same noise
    for name, run in runs.items():
        assert run["loss"] < 0.2 * run["history"].loss[0]
        assert name == "vanilla" or results["ratios"][name]["evaluations"] < 0.95
    data = spiral_neural_sde.spiral_data()
    spiral_neural_sde.draw(tmp_path / "sde.png", data, results["runs"])
    assert (tmp_path / "sde.png").stat().st_size > 10_000


def test_the_latent_sde_is_nearer_to_the_truth_than_its_data(
    examples_path: None, tmp_path: Path
) -> None:
    import latent_sde

    data, model = latent_sde.measure(), latent_sde.LatentSDE(seed=0)
    bounds = latent_sde.train(model, data, iterations=300)
    assert bounds[-1] > 0.1 * bounds[0]  # both are negative
    found = latent_sde.judge(model, data)
    assert found.best < found.posterior < 0.5 * found.measurements
    assert found.covered > 0.85
    period, _ = latent_sde.oscillation(latent_sde.A)
    assert abs(found.period / period - 1) < 0.15
    latent_sde.draw(tmp_path / "latent.png", model, data)
    assert (tmp_path / "latent.png").stat().st_size > 10_000
