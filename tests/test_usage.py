"""What a misspelt option, value or class is answered by, for every command."""

from __future__ import annotations

from pathlib import Path

import pytest

from awconv.cli import main
from awconv.command_parser import make_parser
from awconv.training.find_task import data_sets
from awconv.usage import integers_first, near, near_options

RECIPE = "model: {network: resnet8_cifar}\ntrainer: {max_epochs: 1}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("fit --model.netwrk=x", "there is no option --model.netwrk; near it: --model.network"),
        ("fit --modle.lr=1", "there is no option --modle.lr; near it: --model.lr"),
        ("fit --lr=1", "there is no option --lr; near it: --model.lr"),
        (
            "fit --trainer.max_epoch=3",  # an abbreviation is refused, too
            "there is no option --trainer.max_epoch; near it: --trainer.max_epochs, --trainer.min_epochs",
        ),
        ("fit --data=Cifar", "there is no class 'Cifar' for data; near it: Cifar10, Cifar100"),
        (
            "test --data=Photos",
            "there is no class 'Photos' for data; there are Cifar10, Cifar100, Coco, DigitScenes, Digits, ImageFolder, "
            "Parquet, Voc, WebDataset",
        ),
        ("fit --data.help=Cifra10", "there is no class 'Cifra10' for data; near it: Cifar10, Cifar100"),
        ("validate --data=Cifar10 --data.rot=x", "there is no option --data.rot; near it: --data.root"),
        ("fit --data.batch_size=many", "data.batch_size must be a whole number, got 'many'"),
        ("fit --data.broken_images=skp", "data.broken_images must be refuse or skip, got 'skp'; near it: skip"),
        ("fit --model.lr=fast", "model.lr must be a number, got 'fast'"),
        ("fit --trainer.max_epochs=all", "trainer.max_epochs must be a whole number or null, got 'all'"),
        (
            "fit --trainer.callbacks=EarlyStoping",
            "there is no class 'EarlyStoping' for trainer.callbacks; near it: EarlyStopping",
        ),
        ("fit --model.mixup=3", "model.mixup must be a mapping such as {key: value} or null, got '3'"),
        ("fit --data=nothing.Thing", "data: No module named 'nothing'"),
        ("fit stray", "'stray' is no option: options are written as --NAME=VALUE"),
        (
            "fit --data=ImageFolder",
            "--data.root is missing: the folder that holds train. ImageFolder reads images under root/train/CLASS/ "
            "and, where they exist, root/val/CLASS/ and root/test/CLASS/.",
        ),
        ("models --formt=json", "there is no option --formt; near it: --format"),
        ("models --format=jsn", "format must be table, markdown or json, got 'jsn'; near it: json"),
        ("bench op --devise=cpu", "there is no option --devise; near it: --device"),
        (
            "bench op --dtype=float23",
            "dtype must be float32, bfloat16 or float16, got 'float23'; near it: float32, float16",
        ),
        ("bench", 'expected "subject" to be one of {op,model,detector,export,data}, but it was not provided.'),
        ("predict x.png --ckpt=x --batchsize=3", "there is no option --batchsize; near it: --batch_size"),
        (
            "predict x.png",
            "missing: --ckpt: a checkpoint of awconv fit, compare or demo, or a training's folder; what publish wrote; "
            "a name with weights in timm, such as resnet50, or on the hub, hf-hub:OWNER/NAME; or --model: a file of "
            "awconv export",
        ),
        ("publish run.json --tga=x", "there is no option --tga; near it: --tag"),
        ("demo --seeds=x", "seeds must be a whole number, got 'x'"),
        ("compare r.yaml --seed=1", "there is no option --seed; near it: --seeds"),
        ("compare", "missing: recipe: a YAML file for awconv fit"),
        (
            "compare r.yaml --trainer.max_epochs=1",
            "--trainer.max_epochs is an option of awconv fit; those follow --, as in: awconv compare ... -- "
            "--trainer.max_epochs=1",
        ),
        (
            "ablate r.yaml --data=Cifar10",
            "--data is an option of awconv fit; those follow --, as in: awconv ablate ... -- --data=Cifar10",
        ),
        ("compare r.yaml -- --modle.lr=1", "there is no option --modle.lr; near it: --model.lr"),
        ("ablate r.yaml -- --data=Cifar", "there is no class 'Cifar' for data; near it: Cifar10, Cifar100"),
    ],
)
def test_a_misspelt_word_is_answered_in_a_line(
    arguments: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments.split()) == 2
    printed = capsys.readouterr()
    assert printed.err == f"awconv {arguments.split()[0]}: {message}\n"
    assert printed.out == ""
    assert [path.name for path in folder.iterdir()] == ["r.yaml"]


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        ("model: {lrr: 0.1}", "recipe bad.yaml: there is no setting model.lrr; near it: model.lr"),
        ("modle: {lr: 0.1}", "recipe bad.yaml: there is no setting modle.lr; near it: model.lr"),
        ("model: {lr: fast}", "recipe bad.yaml: model.lr must be a number, got 'fast'"),
        (
            "data: {class_path: Cifra10}",
            "recipe bad.yaml: there is no class 'Cifra10' for data; near it: Cifar10, Cifar100",
        ),
        (
            "data: {class_path: Cifar10, init_args: {rot: x}}",
            "recipe bad.yaml: there is no setting data.rot; near it: data.root",
        ),
        (
            "data: {class_path: Digits, init_args: {batch_size: many}}",
            "recipe bad.yaml: data.batch_size must be a whole number, got 'many'",
        ),
    ],
)
def test_a_misspelt_word_in_a_file_is_named_with_the_file(
    spoilt: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bad.yaml").write_text(f"{RECIPE.splitlines()[1]}\n{spoilt}\n")
    for command in (
        "fit --model.network=resnet8_cifar --config=bad.yaml",
        "compare r.yaml --variants=plain,bad.yaml",
        "compare bad.yaml -- --model.network=resnet8_cifar",
    ):
        assert main(command.split()) == 2
        assert capsys.readouterr().err == f"awconv {command.split()[0]}: {message}\n"


def test_parts_of_dictionaries_and_classes_are_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = "--model.convert.init=identity --trainer.callbacks+=EarlyStopping --trainer.callbacks.patience=2"
    assert main(["fit", *parts.split(), "--model.lrr=1"]) == 2
    assert capsys.readouterr().err == "awconv fit: there is no option --model.lrr; near it: --model.lr\n"


def test_near_names() -> None:
    assert near("cifar", ["Digits", "Cifar100", "Cifar10"]) == ["Cifar10", "Cifar100"]
    assert near("folder", ["Digits", "ImageFolder"]) == ["ImageFolder"]
    assert near("photos", ["Digits", "ImageFolder"]) == []
    assert near_options("root", ["data.root", "model.lr"]) == ["data.root"]
    assert near_options("model.l", ["data.root", "model.lr"]) == ["model.lr"]


def test_the_short_help_fits_a_page_and_names_all_data_sets(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("fit", "test", "validate"):
        assert main([command, "--help"]) == 0
        page = capsys.readouterr().out
        lines = page.splitlines()
        assert len(lines) < 76
        assert max(map(len, lines)) <= 118
        for names in data_sets().values():
            assert all(f"\n  {name}  " in page for name in names)
        topics = ("Data of classification:", "Network:", "Training:", "Trainer (Lightning's):", "Checkpoints:", "Logs:")
        assert all(topic in lines for topic in topics)
        assert lines[-1] == f"awconv {command} --help-all lists all options, Lightning's included."


def test_all_that_the_short_help_names_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--help"])
    named = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    for data in ("Digits", "Coco"):
        with pytest.raises(SystemExit, match="0"):
            main(["fit", f"--data={data}", "--help-all"])
        listed = capsys.readouterr().out
        with pytest.raises(SystemExit, match="0"):
            main(["fit", f"--data.help={data}"])
        listed += capsys.readouterr().out
        named = [name for name in named if name not in listed]
    assert named == []


class EitherNumber:
    def __init__(self, batches: float | int | None = None, share: float | None = None) -> None:
        pass


def test_a_whole_number_is_one_whatever_libraries_have_named_before() -> None:
    """Lightning takes 1 for one batch and 1.0 for all of them."""
    parser = make_parser()
    parser.add_class_arguments(EitherNumber, "one")
    integers_first(parser)
    for text, value in (("1", 1), ("1.0", 1.0), ("0.5", 0.5), ("null", None)):
        found = parser.parse_args([f"--one.batches={text}"]).one.batches
        assert (found, type(found)) == (value, type(value))
    assert parser.parse_args(["--one.share=1"]).one.share == 1.0
