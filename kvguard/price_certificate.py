"""What is guaranteed about prices of harm: the file, its words, and which price a use may take.

`kvguard.price_calibration` makes it from live runs; this module is what a guard needs to read one.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvguard import schema
from kvguard.certificate import Bound, CertificateError
from kvguard.config import Config, digest
from kvguard.harm_model import HarmModel

PRICE_CERTIFICATE = "price_certificate.json"
"""Name of the file, beside the model of harm."""

FORMAT = 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PriceUse(_Part):
    """What a statement about a price is bound to; anywhere else it says nothing.

    Attributes:
        model, model_digest: name, and digest of weights and tokenizer.
        press, press_class, phase, press_settings: as in `certificate.Use`.
        ratio: fraction removed.
        tasks: of the prompts, each with its longest answer in tokens. The statement is about their
            mixture, in the shares of the certifying prompts.
        decoding: how tokens are chosen, `config.Generation.text`.
        bus_ratio: what a byte over the bus costs, see `config_policies.GuardSettings`.
        margin_nats: a token this close to the uncompressed model's best counts as a tie.
        cold: where evicted entries are parked.
        safe_ratio: fraction that SAFE removes.
        batch_size: rows decoded together at most. Fewer rows share the weights among fewer, which
            makes a check cheaper in drafted tokens.
    """

    model: str
    model_digest: str
    press: str
    press_class: str
    phase: str
    press_settings: dict[str, Any] | None = None
    ratio: str
    tasks: dict[str, int]
    decoding: str
    bus_ratio: float
    margin_nats: float
    cold: str
    safe_ratio: float
    batch_size: int

    @property
    def text(self) -> str:
        """The use in one line."""
        lengths = "/".join(map(str, dict.fromkeys(self.tasks.values())))
        return (
            f"{self.model}, {self.press} {self.ratio} ({self.phase}), tasks "
            f"{', '.join(self.tasks)} mixed, at most {lengths} tokens, {self.decoding}, bus "
            f"{self.bus_ratio:g}, at most {self.batch_size} rows"
        )


class PriceBound(_Part):
    """One price and one level: the test of "more than ``bound.alpha`` of requests are harmed"."""

    harm_price: float
    bound: Bound


class PriceStatement(_Part):
    """What is known of all prices at one level of harm, in one use or in all of them mixed.

    Attributes:
        model: name of the model.
        use: None: the mean over all of the model's uses, a request of each as likely.
        level: share of requests that may be harmed.
        prices: in the order of the tests, from the highest price down.
    """

    model: str
    use: PriceUse | None
    level: float
    prices: list[PriceBound] = Field(min_length=1)

    @property
    def certified_price(self) -> float | None:
        """The lowest price of the sequence that is certified; None: none is."""
        made = [one.harm_price for one in self.prices if one.bound.certified]
        return min(made, default=None)

    @property
    def about(self) -> str:
        """The use in words."""
        if self.use is None:
            return f"{self.model}, all conditions mixed in equal shares"
        return self.use.text

    @property
    def text(self) -> str:
        """The statement about the lowest certified price, or the refusal, in words."""
        price = self.certified_price
        if price is None:
            first = self.prices[0]
            return (
                f"{self.about}: no price is certified; harm_price={first.harm_price:g}: "
                f"{first.bound.text}. An infinite price is lossless without a certificate."
            )
        bound = next(one.bound for one in self.prices if one.harm_price == price)
        refused = [one for one in self.prices if not one.bound.certified]
        lower = ""
        if refused:
            lower = f" Next, harm_price={refused[0].harm_price:g}: {refused[0].bound.text}."
        return f"{self.about}: harm_price={price:g}: {bound.text}.{lower}"


class PriceCertificate(_Part):
    """Prices of harm with what live runs on certifying prompts say of each.

    Attributes:
        harm_model_digest: of the model of harm that was asked, `harm_model_digest`.
        delta: of each statement's sequence of tests.
        levels: shares of harmed requests, the primary first.
        looks: certificates made from these prompts so far, this one included.
        frozen: digest of everything that the certificate depends on but the prompts: configuration,
            and the code of guard, live runs and tests.
        frozen_before_prompts: whether that digest was recorded before any prompt was generated.
        uses: one for each model, press and ratio.
        statements: for each model and level, of all uses mixed and of each use.
        prompts_certifying, prompts_digest: the prompts that certify; they fitted nothing.
        trained_by: the run that trained the model of harm, in words; None: the same run.
    """

    format: int = FORMAT
    harm_model_digest: str
    delta: float
    levels: list[float] = Field(min_length=1)
    looks: int = Field(ge=1)
    frozen: str
    frozen_before_prompts: bool
    uses: list[PriceUse]
    statements: list[PriceStatement]
    prompts_certifying: int
    prompts_digest: str
    trained_by: str | None = None

    def mixed(self, model: str, level: float | None = None) -> PriceStatement:
        """The statement of a model over all its uses; None: at the primary level."""
        wanted = self.levels[0] if level is None else level
        for one in self.statements:
            if one.use is None and one.model == model and math.isclose(one.level, wanted):
                return one
        raise CertificateError(f"no statement about {model!r} at a level of {wanted:g}")

    def deployed_price(self, model: str) -> float:
        """The price of ``live.harm_price: certified``; infinite, which is lossless, without one."""
        price = self.mixed(model).certified_price
        return math.inf if price is None else price

    def at_level(self, level: float) -> list[PriceStatement]:
        """Statements of single uses at one level; CertificateError lists the levels there are."""
        found = [one for one in self.statements if one.use and math.isclose(one.level, level)]
        if not found:
            known = ", ".join(f"{one:g}" for one in sorted(self.levels))
            raise CertificateError(
                f"harm_risk: the price certificate has no level of {level:g}; its levels: {known}"
            )
        return found

    def check_model(self, model: HarmModel) -> None:
        """Check that prices belong to this model of harm; CertificateError names both digests."""
        own = harm_model_digest(model)
        if own != self.harm_model_digest:
            raise CertificateError(
                f"the price certificate speaks of the model of harm {self.harm_model_digest}, this "
                f"one is {own}: certify its prices again"
            )

    @property
    def text(self) -> str:
        """The whole certificate in words."""
        made = sum(one.certified_price is not None for one in self.statements)
        count = len(self.statements)
        every = max(1 - count * self.delta, 0)
        reuse = (
            f"These prompts were used for {self.looks} certificates, whose deltas add up."
            if self.looks > 1
            else "These prompts were used for no other certificate."
        )
        frozen = (
            "Everything it depends on was recorded before the prompts were generated."
            if self.frozen_before_prompts
            else "What it depends on was NOT recorded before the prompts were generated: read it "
            "as exploratory."
        )
        summary = (
            f"{made} of {count} statements certify a price, each by itself at {1 - self.delta:.0%} "
            f"over the draw of {self.prompts_certifying} prompts, for requests that resemble "
            f"theirs, answered without streaming what no check has seen. All of them together hold "
            f"with probability at least {every:.0%}. {reuse} {frozen}"
        )
        if self.trained_by is not None:
            summary += f" The model of harm was trained by {self.trained_by}."
        return "\n".join([summary, *(one.text for one in self.statements)])


def at_certified_price(experiment: Config, path: str | Path | None, model: str) -> Config:
    """An experiment at the price that a certificate certifies; without one it is as it was."""
    if path is None:
        return experiment
    price = load_price_certificate(path).deployed_price(model)
    live = experiment.live.model_copy(update={"harm_price": price})
    return experiment.model_copy(update={"live": live})


def harm_model_digest(model: HarmModel) -> str:
    """Digest of what a model of harm computes; where it comes from does not count."""
    return digest(model.model_dump(mode="json", exclude={"provenance"}))


def save_price_certificate(certificate: PriceCertificate, path: str | Path) -> None:
    """Write a certificate as JSON with its text, all or nothing."""
    content = certificate.model_dump(mode="json") | {"text": certificate.text}
    with schema.atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))


def load_price_certificate(path: str | Path) -> PriceCertificate:
    """Read a certificate that `save_price_certificate` wrote.

    Raises:
        FileNotFoundError: names the path and what makes it.
        CertificateError: the file is not a price certificate of this version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no price certificate at {path}; a run with live.certify_prices makes it"
        )
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise CertificateError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise CertificateError(f"{path} is not a price certificate of format {FORMAT}")
    try:
        return PriceCertificate.model_validate({k: v for k, v in content.items() if k != "text"})
    except ValidationError as error:
        raise CertificateError(f"{path} is not a price certificate:\n{error}") from None
