"""The protocols that measure an encoder: kNN, linear, fine-tuned and supervised classification."""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from fastsimclr.config import to_yaml
from fastsimclr.data import Source
from fastsimclr.data.loader import LoaderConfig
from fastsimclr.data.subsets import hold_out
from fastsimclr.distributed import World, run_on_all_ranks
from fastsimclr.environment import commit
from fastsimclr.errors import UserError
from fastsimclr.evaluation import linear
from fastsimclr.evaluation.classifier import Classifier, Schedule, train_classifier
from fastsimclr.evaluation.config import (
    EvaluationConfig,
    FinetuneConfig,
    KnnConfig,
    LinearConfig,
    SupervisedConfig,
)
from fastsimclr.evaluation.features import Shard, check_images, embed, embed_shard, gather_bad, gather_by_image
from fastsimclr.evaluation.knn import knn_ranking
from fastsimclr.evaluation.labeled import explain_recorded_path, open_labeled
from fastsimclr.evaluation.scores import rank_classes, score
from fastsimclr.imports import is_object_reference
from fastsimclr.models import Backbone, Encoder, EncoderSpec, as_encoder, build, import_module
from fastsimclr.optim import is_transformer
from fastsimclr.precision import choose_precision
from fastsimclr.pretrained import Pretrained
from fastsimclr.run_folder import RunFolder, check_output, write_atomically

HELD_OUT = 0.2  # fraction of the training images on which lbfgs selects its regularization
FEW_LABELS = 0.02  # the paper fine-tunes for 60 epochs on 1 % of the labels, for 30 on 10 %
LR_AT_256 = {LinearConfig: 0.1, FinetuneConfig: 0.05, SupervisedConfig: 0.1}
WEIGHT_DECAY = {LinearConfig: 0.0, FinetuneConfig: 0.0, SupervisedConfig: 1e-4}
TRANSFORMER_LR_AT_512, TRANSFORMER_WEIGHT_DECAY = 5e-4, 0.05  # DeiT (arXiv 2012.12877), table 9


class Evaluation:
    """An evaluation of an encoder. Creating it opens and checks the data, model and output on every rank."""

    def __init__(self, config: EvaluationConfig, pretrained: Pretrained | None, world: World) -> None:
        self.config, self.pretrained, self.world = config, pretrained, world
        self.augmentation = config.data.augmentation()
        self.precision = choose_precision(config.precision, world.device)
        self.loader = LoaderConfig(
            batch_size=config.batch_size,
            backend=config.data.backend,
            world=world,
            seed=config.seed,
            workers=config.data.workers,
            max_bad=config.data.max_bad,
        )
        self.settings: dict[str, Any] = {}
        """Settings that the protocol used, for the record."""
        self.output = run_on_all_ranks(self._choose_output, world)
        self.result = self.output / f"{config.name()}.json"
        self.weights = self.result.with_suffix(".pt")
        run_on_all_ranks(lambda: self._check_output() if world.is_rank_zero else None, world)
        # Images that the run held out are held out here, whatever --seed is.
        recorded = (pretrained.config if pretrained is not None else None) or {}
        split_seed = recorded.get("seed", config.seed)
        with explain_recorded_path(config.checkpoint, pretrained):
            self.data = open_labeled(
                config.data, getattr(config, "labels", 1.0), config.seed, world, split_seed=split_seed
            )
        run_on_all_ranks(self._check_data, world)
        torch.manual_seed(config.seed)
        self.model = self._encoder()

    def _choose_output(self) -> Path:
        """The folder of the results."""
        output = self.config.output
        return Path(output) if output else RunFolder.for_results(self.config.checkpoint).evaluate

    def _check_output(self) -> None:
        check_output(self.result, self.config.force)
        if not isinstance(self.config, KnnConfig):
            check_output(self.weights, self.config.force)

    def _check_data(self) -> None:
        if isinstance(self.config, KnnConfig):
            others = len(self.data.train) - (self.data.val is None)
            if self.config.k > others:
                raise UserError(
                    f"--k: got {self.config.k}, more than the {others} images that can be neighbors; "
                    f"expected at most {others}"
                )
        elif self.data.val is None:
            raise UserError("--data.val: got none, expected labeled images that are not in the training set")

    def run(self) -> None:
        """Run the protocol, write the record, and print the summary."""
        started = time.monotonic()
        torch.backends.cudnn.benchmark = True
        config = self.config
        if isinstance(config, KnnConfig):
            ranking, labels = self._knn(config)
        elif isinstance(config, LinearConfig) and config.solver == "lbfgs":
            ranking, labels = self._regression(config)
        else:
            ranking, labels = self._classifier(config)
        for source in filter(None, (self.data.train, self.data.val)):
            gather_bad(source, self.world)
        scores = score(ranking, labels, len(self.data.classes)).to_json(self.data.classes)
        if self.world.is_rank_zero:
            record = self._record(time.monotonic() - started) | scores
            write_atomically(self.result, lambda file: file.write_text(json.dumps(record) + "\n"))
            print(self._summary(record), flush=True)

    def _knn(self, config: KnnConfig) -> tuple[Tensor, Tensor]:
        """Rankings and labels of the queries; each rank classifies its part of them."""
        device, data = self.world.device, self.data
        bank = self._embed_shard(data.train, "training images")
        queries = bank if data.val is None else self._embed_shard(data.val, "validation images")
        self.settings = {"k": config.k, "temperature": config.temperature, "leave_one_out": data.val is None}
        ranking = knn_ranking(
            bank,
            torch.from_numpy(data.train.labels).to(device),
            queries,
            config.k,
            temperature=config.temperature,
            leave_one_out=data.val is None,
            world=self.world,
        )
        images, ranking = gather_by_image(self.world, queries.images.cpu(), ranking.cpu())
        return ranking, torch.from_numpy((data.train if data.val is None else data.val).labels)[images]

    def _regression(self, config: LinearConfig) -> tuple[Tensor, Tensor]:
        """Rankings and labels of the validation images; every rank computes all of them, without communication."""
        device, data = self.world.device, self.data
        model, classes = self.model, len(data.classes)
        assert data.val is not None
        images, *embedded = self._embed(model, data.train, "training images")
        features, labels = (part.to(device) for part in embedded)
        _, val_features, val_labels = self._embed(model, data.val, "validation images")
        c, accuracy_of_c = config.c, dict[float, float]()
        if c == "auto":
            parts = hold_out(data.train.subset(images.numpy()), HELD_OUT, config.seed)
            c, accuracy_of_c = linear.choose_c(features, labels, classes, *parts)
        fitted = linear.fit(features, labels, classes, c)
        held_out_accuracy = {f"{each:g}": accuracy for each, accuracy in accuracy_of_c.items()}
        self.settings = {"solver": "lbfgs", "c": c, "held_out_accuracy": held_out_accuracy}
        classifier = Classifier(model, classes, frozen=True)
        classifier.fc.load_state_dict(fitted._asdict())
        self._save(classifier)
        return linear.rank(fitted, val_features.to(device)).cpu(), val_labels

    def _classifier(self, config: EvaluationConfig) -> tuple[Tensor, Tensor]:
        assert isinstance(config, LinearConfig | FinetuneConfig | SupervisedConfig)
        assert self.data.val is not None
        schedule = self._schedule(config)
        classifier = Classifier(self.model, len(self.data.classes), frozen=isinstance(config, LinearConfig))
        losses = train_classifier(
            classifier,
            self.data.train,
            self.augmentation,
            schedule,
            self.loader,
            self.precision,
            title=config.name(),
        )
        self.settings = vars(schedule) | {"epoch_losses": losses}
        self._save(classifier)
        _, logits, labels = self._embed(classifier, self.data.val, "validation images")
        return rank_classes(logits), labels

    def _schedule(self, config: LinearConfig | FinetuneConfig | SupervisedConfig) -> Schedule:
        batch_size = min(config.batch_size, len(self.data.train))
        epochs = config.epochs
        if epochs == "auto":
            epochs = 60 if len(self.data.train) <= FEW_LABELS * self.data.available_images else 30
        optimizer, lr, weight_decay = "sgd", LR_AT_256[type(config)] * batch_size / 256, WEIGHT_DECAY[type(config)]
        if not isinstance(config, LinearConfig) and is_transformer(self.model)[0]:
            optimizer, lr, weight_decay = "adamw", TRANSFORMER_LR_AT_512 * batch_size / 512, TRANSFORMER_WEIGHT_DECAY
        return Schedule(
            epochs,
            lr if config.lr == "auto" else config.lr,
            batch_size,
            optimizer,
            weight_decay if config.weight_decay == "auto" else config.weight_decay,
            warmup_epochs=config.warmup_epochs if isinstance(config, SupervisedConfig) else 0.0,
        )

    def _encoder(self) -> Encoder | Backbone:
        """The checkpoint's encoder; for `supervised`, a new encoder of the same architecture."""
        config = self.config
        if isinstance(config, SupervisedConfig):
            model = self._new_encoder(config)
        else:
            assert self.pretrained is not None
            model = self.pretrained.encoder
        check_images(model, self.data.train, self.augmentation)
        return model.to(self.world.device, self.precision.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def _new_encoder(self, config: SupervisedConfig) -> Encoder | Backbone:
        """A new encoder of the checkpoint's architecture, or of that of --encoder."""
        given = self.pretrained.encoder if self.pretrained is not None else None
        size, channels = self.augmentation.image_size, self.data.train.pixels.channels
        if config.encoder is not None and is_object_reference(config.encoder):
            module = import_module(config.encoder)
            if isinstance(given, Backbone) and module is given.module:
                raise UserError(
                    f"--encoder: got {config.encoder}, the module that holds the weights of --checkpoint; expected a "
                    "class or function that makes a new one"
                )
            return as_encoder(module, image_size=size, channels=channels)
        if given is not None:
            return build(replace(given.spec, image_size=size))
        assert config.encoder is not None
        return build(EncoderSpec(config.encoder, config.width, config.stem, size, channels))

    def _embed_shard(self, source: Source, title: str) -> Shard:
        return embed_shard(
            self.model, source, self.augmentation, self.loader, autocast=self.precision.autocast, title=title
        )

    def _embed(self, model: torch.nn.Module, source: Source, title: str) -> tuple[Tensor, Tensor, Tensor]:
        return embed(
            model,
            source,
            self.augmentation,
            self.loader,
            autocast=self.precision.autocast,
            title=title,
        )

    def _save(self, classifier: Classifier) -> None:
        """Save the encoder and its classifier as a state dict that the model of its library loads."""
        if self.world.is_rank_zero:
            write_atomically(self.weights, lambda file: torch.save(classifier.library_state(), file))

    def _record(self, seconds: float) -> dict[str, Any]:
        config, data = self.config, self.data
        built = self.model
        val = None
        if data.val is not None:
            val = config.data.val if isinstance(config.data.val, str) else config.data.train
        return {
            "protocol": config.name(),
            "checkpoint": config.checkpoint,
            "origin": self.pretrained.origin if self.pretrained is not None else None,
            "encoder": asdict(built.spec) | {"features": built.out_features},
            "train": {"path": config.data.train, "images": _usable(data.train), "of": data.available_images},
            "val": {"path": val, "images": _usable(data.train if data.val is None else data.val)},
            "skipped_images": data.skipped,
            "settings": self.settings,
            "options": yaml.safe_load(to_yaml(self.config)),
            "precision": self.precision.why,
            "device": str(self.world.device),
            "world_size": self.world.world_size,
            "seconds": seconds,
            "versions": {"torch": torch.__version__},
            "commit": commit(),
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }

    def _summary(self, record: dict[str, Any]) -> str:
        held_out = f"of {record['val']['path']}" if self.data.val is not None else "leave-one-out"
        if isinstance(self.config.data.val, float):
            held_out = f"held out {held_out}"
        top5 = f", top-5 {record['top5']:.2%}" if len(self.data.classes) > 5 else ""
        return (
            f"{record['protocol']}: top-1 {record['top1']:.2%}{top5} on {record['val']['images']} images ({held_out}), "
            f"{record['train']['images']} labels, {record['seconds']:.0f} s; {self.result}"
        )


def _usable(source: Source) -> int:
    return len(source) - len(source.bad)
