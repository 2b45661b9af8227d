"""Flags: wrong words, settings without effect, recipes, and the help texts."""

import importlib
import sys

import pytest

from equivalence_tests.program.command import ROOT, refused, run_script
from flax_resnet.commands import cli, exits, main, plan
from flax_resnet.config import USED_WITH, TrainConfig, idle, to_dict
from flax_resnet.errors import InputError
from flax_resnet.recipes import RECIPES
from flax_resnet.training.fit import fit

WRONG_WORDS = [
    (["--arch", "resnet19"], ["--arch", "resnet19", "resnet1"]),
    (["--epohcs", "3"], ["--epohcs", "--epochs"]),
    (["--qqqq"], ["'--qqqq'; valid: -h, --help", " more"]),
    (["--optimizer", "sdg"], ["sdg", "'sgd'"]),
    (["--dataset", "digts"], ["error: unknown data set 'digts'", "'digits'"]),
    (["--image-size", "9", "--resize-size", "8"], ["error: --resize-size is smaller"]),
    (["--dataset", "floder:x"], ["floder", "'folder:'"]),
    (["--dataset", "folder:"], ["'folder:': DIR is missing"]),
    (["--init-from", ""], ["an empty word is given after --init-from"]),
    (["--config", ""], ["an empty word is given after --config"]),
    (["--recipe="], ["an empty word is given"]),
    (["--run-dir", ""], ["an empty word is given after --run-dir"]),
    (["--epochs", "ten"], ["--epochs", "ten"]),
    (["--epochs", "0"], ["--epochs", "0"]),
    (["--batch-size", "0"], ["--batch-size"]),
    (["--lr", "-1"], ["--lr", "-1"]),
    (["--lr", "nan"], ["--lr", "nan"]),
    (["--dropout", "1"], ["--dropout"]),
    (["--num-classes", "1000000000"], ["--num-classes"]),
    (["--num-classes", "7"], ["--num-classes 7", "10 classes"]),
    (["--stem", "cifar", "--arch", "resnet20"], ["own stem"]),
    (["--batch-size", "5000"], ["5000", "training split"]),
    (["--mean", "0.5"], ["--mean and --std"]),
    (["--mean", "nan", "--std", "1"], ["--mean", "nan"]),
    (["--mean", "inf", "--std", "1"], ["--mean", "inf"]),
    (["--mean", "1", "1", "--std", "1", "1"], ["2 values", "1 channels"]),
    (["--mean", "1", "--std", "1", "1"], ["std has 2 values", "1 channels"]),
    (["--image-size", "7"], ["basic_cnn", "8x8", "7x7", "--image-size 7"]),
    (["--arch", "resnet18", "--batch-size", "1"], ["BatchNorm", "--batch-size 1"]),
    (["--test-fraction", "0"], ["digits", "no test split", "--test-fraction"]),
    (["--new-head"], ["--new-head", "--init-from"]),
    (["--freeze-backbone"], ["--freeze-backbone", "--init-from"]),
    (["--zero-init-residual"], ["--zero-init-residual", "basic_cnn"]),
    (["--dataset", "tfds:mnist", "--on-bad-image", "skip"], ["--on-bad-image", "tfds:mnist"]),
    (["--cycle-momentum", "--schedule", "cosine"], ["--cycle-momentum", "onecycle", "cosine"]),
    (["--cycle-momentum", "--momentum", "0"], ["--cycle-momentum", "sgd", "--momentum 0"]),
    (["--deterministic", "--parallel", "pmap"], ["--deterministic", "--parallel jit"]),
    (["--arch", "resnet20", "--batch-norm-images", "48"], ["--batch-norm-images 48", "128"]),
    (["--batch-norm-images", "32"], ["--batch-norm-images", "basic_cnn", "no BatchNorm"]),
    (
        "--arch resnet20 --init-from w.pth --freeze-backbone --batch-norm-images 4".split(),
        ["--batch-norm-images", "--freeze-backbone"],
    ),
    (
        "--arch resnet20 --devices 2 --batch-size 12 --batch-norm-images 4".split(),
        ["--batch-norm-images 4", "2 devices with 6 images each"],
    ),
    (
        "--arch resnet20 --image-size 4 --batch-norm-images 1".split(),
        ["BatchNorm", "more than one value per channel"],
    ),
    (["--shard-parameters", "--reduce-dtype", "bfloat16"], ["--reduce-dtype", "--shard-param"]),
    (["--shard-parameters", "--parallel", "pmap"], ["--shard-parameters", "--parallel jit"]),
    (["--cache", "device", "--random-resized-crop"], ["--random-resized-crop", "--cache device"]),
    (["--resume", "--overwrite"], ["--resume", "--overwrite", "exclude"]),
    (["--patience", "2", "--validation-fraction", "0"], ["validation"]),
    (["--monitor", "validation_accuracy", "--validation-fraction", "0"], ["monitor", "split"]),
    (["--dataset", str(ROOT)], ["did you mean", f"folder:{ROOT}"]),
    (["--devices", "99"], ["99"]),
    (["--recipe", "cifar10-resnet19"], ["recipe"]),
    (["--recipe", "cifar10-resnet20-24-to-32px"], ["cifar10-resnet20-24px-start", "--init-from"]),
    (["--config", "no-such-file.json"], ["no-such-file.json"]),
    (["--dataset", "folder:caf\udce9"], ["--dataset", "not in UTF-8", r"caf\udce9"]),
    (["--dataset", "folder:no-such-folder"], ["no-such-folder"]),
    (["--dataset", "folder:~no-such-user/a"], ["no-such-user"]),
    (["--dataset", "cifar10:~no-such-user/a"], ["no-such-user"]),
    (["--connect-timeout", "0"], ["--connect-timeout", "at least 1"]),
    (["--dataset", "tfds:no_such_set"], ["no_such_set"]),
    (["--init-from", "no-such-run"], ["no-such-run"]),
    (["--resume", "--overwrite", "extra"], ["extra"]),
    (["--schedule", "cosine", "--milestones", "3"], ["milestones", "cosine", "multistep"]),
    (["--beta1", "0.5"], ["--beta1", "sgd", "--optimizer adam or adamw"]),
    (["--warmup-factor", "0.5"], ["--warmup-factor", "--warmup-epochs above 0"]),
    (["--schedule", "multistep", "--milestones", "9", "3"], ["--milestones", "later", "9 3"]),
    (["--schedule", "step", "--step-epochs", "9999999999"], ["--step-epochs", "100000"]),
    (["--schedule", "multistep", "--milestones", "1000000000000000000"], ["--milestones"]),
    (["--eval-batch-size", "1000000000000"], ["--eval-batch-size", "1000000"]),
    (["--lr", "1e300"], ["--lr", "less than or equal to 1000", "1e300"]),
    (["--l1", "1e-320"], ["--l1", "float32"]),
    (["--optimizer", "adam", "--eps", "1e-50"], ["--eps", "1e-50", "greater than or equal"]),
    (["--beta2", "0.9999999999", "--optimizer", "adam"], ["--beta2", "0.999999"]),
]


@pytest.mark.parametrize("arguments,words", WRONG_WORDS, ids=lambda x: " ".join(x)[:40])
def test_wrong_words_are_one_line_and_leave_nothing(tmp_path, arguments, words):
    outcome = run_script(
        "train.py", "--arch", "basic_cnn", "--run-dir", tmp_path / "run", "--devices", 1, *arguments
    )
    refused(outcome, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [("predict.py", "run", ""), ("convert.py", "run", "")])
def test_an_empty_word_is_not_the_working_directory(words):
    """A shell makes it of a variable that is not set."""
    refused(run_script(*words), "an empty word is given after run")


def test_a_seed_of_reproduce_that_no_run_takes_is_refused():
    refused(run_script("reproduce.py", "--seeds", 0, -1), "--seed", "-1")


def test_an_empty_name_in_a_config_is_refused():
    """Otherwise a training would begin from scratch."""
    with pytest.raises(ValueError, match="the name is empty"):
        TrainConfig(init_from="")


def test_one_fault_is_one_complaint():
    with pytest.raises(InputError, match=r"^--milestones: [^;]* got '0'$"):
        cli.merge(TrainConfig(), {"schedule": {"milestones": ["0"]}})


OTHERS = {"optimizer": ("sgd", "adam"), "schedule": ("constant",), "cache": ("none",)}
OTHERS |= {"dataset": ("digits",), "dtype": ("bfloat16",)}
OTHERS |= {"loss": ("cross_entropy",), "auto_augment": (None, "ta_wide")}
GIVEN = {"train_size": 160, "bce_threshold": 0.5, "scale": [0.2, 0.9], "ratio": [1.0, 2.0]}
GIVEN |= {"precision": "highest"}
CHANGED = {bool: lambda x: not x, int: lambda x: x + 1, float: lambda x: x / 2 or 0.5}
CHANGED |= {str: lambda x: "skip", list: lambda x: [7]}


@pytest.mark.parametrize("name", USED_WITH)
def test_a_setting_without_effect_is_named(name):
    """The message names the settings that would use it; the default value is no fault."""
    groups = {g: v for g, v in to_dict(TrainConfig()).items() if isinstance(v, dict)}
    default = next(values[name] for values in groups.values() if name in values)
    changed = GIVEN.get(name) or CHANGED[type(default)](default)
    other, *users = USED_WITH[name]

    def faults_with(value):
        asked = {name: changed, other: value}
        nested = {g: {n: asked[n] for n in asked.keys() & v} for g, v in groups.items()}
        return idle(cli.merge(TrainConfig(), nested))

    passed_over = next(value for value in OTHERS.get(other, (0,)) if value not in users)
    assert all(word in faults_with(passed_over)[name] for word in (other, *users))
    for value in users or [0.5 if other == "ema_decay" else 1]:
        assert name not in faults_with(f"{value}:x" if other == "dataset" else value)


def with_flags(base, *flags):
    parser = cli.Parser()
    cli.add_config_flags(parser)
    return cli.with_flags(base, parser.parse_args(flags))


@pytest.mark.parametrize("name", RECIPES)
def test_a_flag_takes_the_effect_of_what_a_recipe_says_without_a_word(name):
    """A flag may switch off a recipe's setting, but not a setting given as another flag."""
    recipe = RECIPES[name].config
    assert not idle(recipe) and with_flags(recipe) == recipe
    changed = with_flags(recipe, "--schedule", "constant", "--optimizer", "adam")
    assert not idle(changed) and changed.optimizer.lr == recipe.optimizer.lr
    assert "gamma" in idle(with_flags(recipe, "--schedule", "constant", "--gamma", "0.7"))


def test_help_explains_every_flag():
    outcome = run_script("train.py", "--help")
    assert outcome.status == 0
    for word in ("--label-smoothing", "(default: 0.04)", "--no-nesterov", "Share of the target"):
        assert word in outcome.out
    assert "--lr FLOAT" in outcome.out and " TEXT" not in outcome.out


def test_every_help_text_stands_alone_and_names_flags():
    parser = cli.Parser()
    cli.add_config_flags(parser)
    for action in parser._actions:
        first = action.help.split()[0]
        assert first not in ("Of", "What", "Where", "Which", "How", "Left"), action.help
        assert "`" not in action.help and "init_from" not in action.help


def test_a_command_that_infers_settings_shows_no_defaults_of_the_training():
    parser = cli.Parser()
    cli.add_config_flags(parser, ("arch",))
    assert "basic_cnn" in parser.format_help() and "(default:" not in parser.format_help()


@pytest.mark.parametrize("script,words", [("train", "[flags]"), ("convert", "IN OUT [flags]")])
def test_help_says_first_what_a_command_does(script, words):
    out = run_script(f"{script}.py", "--help").out
    about, usage = (
        out.index(f"python scripts/{script}.py"),
        out.index(f"usage: {script}.py {words}"),
    )
    assert out[0].isupper() and about < usage


def test_the_library_names_settings_and_the_commands_flags(tmp_path):
    config = cli.merge(TrainConfig(), {"parallel": {"parallel": "pmap", "shard_parameters": True}})
    with pytest.raises(InputError, match="`shard_parameters`: pmap") as error:
        fit(config, tmp_path / "run")
    assert "--" not in str(error.value)
    outcome = run_script("train.py", "--parallel", "pmap", "--shard-parameters")
    refused(outcome, "--shard-parameters: pmap")
    assert cli.as_flags("a smaller `batch_size`; `x y`") == "a smaller --batch-size; `x y`"


def test_a_plan_needs_no_weights_of_another_recipe(monkeypatch):
    monkeypatch.setattr("sys.argv", ["plan.py", "--recipe", "transfer", "--target", "h100"])
    assert cli.build_config(plan.parse(), TrainConfig()) == RECIPES["transfer"].config


@pytest.mark.parametrize("name", main.COMMANDS)
def test_the_installed_command_shows_examples_that_it_takes(name):
    module = importlib.import_module(main.COMMANDS[name][0])
    parser = cli.Parser(prog=f"flax-resnet {name}", description=module.__doc__)
    lines = [line for line in parser.format_help().splitlines() if line.startswith("flax-resnet")]
    assert lines and all(line.split()[1] in main.COMMANDS for line in lines)
    assert "scripts/" not in parser.format_help()


@pytest.mark.parametrize(
    ("program", "command"),
    [
        ("flax-resnet cross-validate", "flax-resnet cross-validate --folds 2 'a b'"),
        ("scripts/cross_validate.py", "python scripts/cross_validate.py --folds 2 'a b'"),
    ],
)
def test_a_report_names_the_command_as_it_is_typed(monkeypatch, program, command):
    monkeypatch.setattr(sys, "argv", [program, "--folds", "2", "a b"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert exits.command_line() == command
    assert exits.other_command("cross-validate", ["--folds", "2", "a b"]) == command
