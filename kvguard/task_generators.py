"""Generated tasks: seeded questions with a known answer, no download.

Every question is drawn by a generator of its own from (seed, task, number): the first n questions
do not depend on how many are asked. Prompts of one task are independent draws, so they have no
template.
"""

import json
import random
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

from kvguard.config_tasks import (
    Copy,
    GeneratedTask,
    Instructions,
    Needle,
    Recall,
    Records,
    Task,
    ToolCall,
)
from kvguard.tasks import NOUNS, Question, constraint_text, hex_digest, words

ADJECTIVES = words(
    "amber brave calm dusty eager faint gentle hollow icy jolly keen lucky mellow noble olive "
    "proud quick rusty silent tidy upper vivid warm young zesty"
)
ANIMALS = words(
    "badger camel dolphin eagle ferret gecko heron ibis jackal koala lemur marten newt otter "
    "panda quail raven stork tapir urchin viper walrus yak zebra falcon"
)
FIRST_NAMES = words(
    "Alma Bruno Clara Dario Elena Farid Greta Hugo Irene Jonas Kira Luca Maya Nils Olga Pablo "
    "Quinn Rosa Stefan Tara Ulrich Vera Wanda Yusuf Zoe"
)
LAST_NAMES = words(
    "Adler Bauer Costa Dumont Ekberg Ferrari Gruber Hansen Ivanov Jensen Kowalski Lindqvist "
    "Moreau Novak Okafor Petrov Quist Rossi Sato Tanaka Ueda Varga Weber Yilmaz Zeller"
)
CITIES = words(
    "Athens Bergen Cairo Dublin Essen Florence Geneva Hamburg Istanbul Jakarta Krakow Lisbon "
    "Madrid Naples Oslo Porto Quito Riga Seville Tunis Utrecht Vienna Warsaw Zagreb Turin"
)
JOBS = words(
    "baker carpenter dentist electrician florist gardener historian judge lawyer mechanic nurse "
    "painter pilot plumber sailor surgeon tailor teacher vet writer"
)
COLOURS = words("red blue green yellow purple orange black white brown pink grey violet")
FOODS = words(
    "pizza soup salad curry pasta rice stew noodles sushi tacos pancakes omelette risotto"
)
PETS = words("cat dog hamster parrot rabbit turtle goldfish pony canary snake")
INSTRUMENTS = words("piano violin guitar flute drums cello trumpet harp organ banjo")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

_SUBJECTS = words(
    "The old committee | A small group of visitors | The local newspaper | Most of the neighbours "
    "| The evening class | A retired engineer | The town council | One of the guides | The "
    "weather service | A passing cyclist | The night shift | Every second guest",
    separator=" | ",
)
_VERBS = words(
    "talked about | complained about | was pleased with | wrote a report on | forgot about | "
    "argued over | waited for | voted on | asked about | made plans for",
    separator=" | ",
)
_OBJECTS = words(
    "the new timetable | the long queue | the broken elevator | the price of coffee | the "
    "repairs nearby | the opening hours | the noise at night | the plans for spring | the narrow "
    "streets | the yearly festival | the missing signs | the crowded buses",
    separator=" | ",
)


def recall(task: Recall, seed: int) -> tuple[Iterator[Question], list[Question]]:
    """Codes of named things; some are asked for: one key of n, or several in an order."""

    def draw(rng: random.Random) -> Question:
        keys = _names(rng, task.items)
        codes = [str(code) for code in rng.sample(range(1000, 10000), task.items)]
        lines = [f"The code for {k} is {c}." for k, c in zip(keys, codes, strict=True)]
        first = _place(rng, task.items - task.asked, task.distance)
        chosen = list(range(first, first + task.asked))
        rng.shuffle(chosen)
        items = [codes[index] for index in chosen]
        if task.asked == 1:
            question = f"What is the code for {keys[chosen[0]]}? Answer with one short sentence."
            worked = f"The code for {keys[chosen[0]]} is {items[0]}."
        else:
            asked = ", ".join(keys[index] for index in chosen)
            question = (
                f"What are the codes for {asked}? Answer with the codes only, in this order, "
                "separated by commas."
            )
            worked = ", ".join(items)
        text = _arrange("\n".join(lines), question, task)
        return Question(text, ", ".join(items), worked, {"items": items})

    return _draw_all(task, seed, draw)


def copy(task: Copy, seed: int) -> tuple[Iterator[Question], list[Question]]:
    """A list of words to be repeated: as it is, reversed, or every second item."""
    how = {
        "verbatim": "Repeat the list exactly",
        "reversed": "Repeat the list in reverse order, from the last item to the first",
        "every_second": "Repeat every second item of the list, starting with the first",
    }
    step = {"verbatim": 1, "reversed": -1, "every_second": 2}

    def draw(rng: random.Random) -> Question:
        listed = rng.sample(NOUNS, task.items)
        items = listed[:: step[task.order]]
        question = f"{how[task.order]}, separated by commas. Write nothing else."
        context = _with_filler(rng, f"List: {', '.join(listed)}.", task.filler_sentences)
        worked = ", ".join(items)
        return Question(_arrange(context, question, task), worked, worked, {"items": items})

    return _draw_all(task, seed, draw)


def records(task: Records, seed: int) -> tuple[Iterator[Question], list[Question]]:
    """Fields of a paragraph about a person, to be listed in an order that is asked for."""

    def draw(rng: random.Random) -> Question:
        name = f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
        values = {
            "age": str(rng.randrange(20, 80)),
            "job": rng.choice(JOBS),
            "city": rng.choice(CITIES),
            "favourite colour": rng.choice(COLOURS),
            "favourite food": rng.choice(FOODS),
            "pet": rng.choice(PETS),
            "instrument": rng.choice(INSTRUMENTS),
            "locker number": str(rng.randrange(100, 1000)),
        }
        sentences = {
            "age": f"{name} is {values['age']} years old.",
            "job": f"{name} works as a {values['job']}.",
            "city": f"{name} lives in {values['city']}.",
            "favourite colour": f"The favourite colour of {name} is {values['favourite colour']}.",
            "favourite food": f"At lunch {name} likes {values['favourite food']} best.",
            "pet": f"At home {name} has a {values['pet']}.",
            "instrument": f"On weekends {name} plays the {values['instrument']}.",
            "locker number": f"The locker number of {name} is {values['locker number']}.",
        }
        told = rng.sample(sorted(values), max(task.items, min(len(values), task.items + 1)))
        fields = rng.sample(told, task.items)
        context = _with_filler(rng, " ".join(sentences[f] for f in told), task.filler_sentences)
        question = (
            f"List these of {name}: {', '.join(fields)}. Give the values only, in this order, "
            "separated by commas."
        )
        items = [values[field] for field in fields]
        worked = ", ".join(items)
        spec = {"items": items, "fields": fields}
        return Question(_arrange(context, question, task), worked, worked, spec)

    return _draw_all(task, seed, draw)


def tool_call(task: ToolCall, seed: int) -> tuple[Iterator[Question], list[Question]]:
    """A call of a tool as JSON whose arguments stand in a message."""
    tools: dict[str, tuple[str, dict[str, Callable[[random.Random], object]]]] = {
        "book_table": (
            "Please book a table for {guest} in {city}, {people} people, on {day} at {hour}. The "
            "phone number is {phone}.",
            {
                "guest": lambda r: f"{r.choice(FIRST_NAMES)} {r.choice(LAST_NAMES)}",
                "city": lambda r: r.choice(CITIES),
                "people": lambda r: r.randrange(2, 20),
                "day": lambda r: r.choice(DAYS),
                "hour": lambda r: f"{r.randrange(11, 22)}:{r.choice(['00', '15', '30', '45'])}",
                "phone": lambda r: str(r.randrange(10**6, 10**7)),
            },
        ),
        "send_parcel": (
            "Please send a parcel to {recipient} in {city}. It weighs {weight} grams, the order "
            "number is {order}, it should arrive on {day}, and the box is {colour}.",
            {
                "recipient": lambda r: f"{r.choice(FIRST_NAMES)} {r.choice(LAST_NAMES)}",
                "city": lambda r: r.choice(CITIES),
                "weight": lambda r: r.randrange(100, 5000),
                "order": lambda r: str(r.randrange(10**5, 10**6)),
                "day": lambda r: r.choice(DAYS),
                "colour": lambda r: r.choice(COLOURS),
            },
        ),
        "rent_car": (
            "Please rent a car for {driver} in {city} from {day}, for {days} days. The customer "
            "number is {customer}, and the car should be {colour}.",
            {
                "driver": lambda r: f"{r.choice(FIRST_NAMES)} {r.choice(LAST_NAMES)}",
                "city": lambda r: r.choice(CITIES),
                "day": lambda r: r.choice(DAYS),
                "days": lambda r: r.randrange(2, 30),
                "customer": lambda r: str(r.randrange(10**5, 10**6)),
                "colour": lambda r: r.choice(COLOURS),
            },
        ),
    }

    def draw(rng: random.Random) -> Question:
        tool = rng.choice(sorted(tools))
        message, makers = tools[tool]
        values = {argument: make(rng) for argument, make in makers.items()}
        signatures = {}
        for other, (_, theirs) in sorted(tools.items()):
            chosen = rng.sample(list(theirs), task.items)
            signatures[other] = sorted(chosen, key=list(theirs).index)
        arguments = {argument: values[argument] for argument in signatures[tool]}
        listed = ", ".join(f"{other}({', '.join(its)})" for other, its in signatures.items())
        context = _with_filler(
            rng, f"Tools: {listed}\nMessage: {message.format(**values)}", task.filler_sentences
        )
        question = (
            f"Call {tool} as the message says. Reply with one JSON object on one line and nothing "
            'else: {"name": ..., "arguments": {...}}'
        )
        call: dict[str, Any] = {"name": tool, "arguments": arguments}
        worked = json.dumps(call)
        return Question(_arrange(context, question, task), worked, worked, call)

    return _draw_all(task, seed, draw)


def needle(task: Needle, seed: int) -> tuple[Iterator[Question], list[Question]]:
    """A fact among other facts of its kind in a longer text."""

    def draw(rng: random.Random) -> Question:
        sentences, city, answer, others = _passage(rng, task.sentences, task.items, task.distance)
        question = f"What is the secret word in {city}? Answer with one short sentence."
        text = _arrange(" ".join(sentences), question, task)
        worked = f"The secret word in {city} is {answer}."
        return Question(text, answer, worked, {"answer": answer, "others": others})

    return _draw_all(task, seed, draw)


def instructions(task: Instructions, seed: int) -> tuple[Iterator[Question], list[Question]]:
    """Constraints on the form of an answer, before a passage and a question about it."""
    exclusive = [{"uppercase", "lowercase"}, {"start", "quotes"}, {"end", "quotes"}]
    openings = [
        "Answer:",
        "Reply:",
        "Result:",
        "Note:",
        "Report:",
        "Solution:",
        "Notice:",
        "Finding:",
    ]
    closings = ["That is all.", "Over and out.", "End of message.", "Have a good day."]

    def draw(rng: random.Random) -> Question:
        kinds: list[str] = []
        for kind in rng.sample(task.constraints, len(task.constraints)):
            clashes = any(kind in pair and pair & set(kinds) for pair in exclusive)
            if len(kinds) < task.items and not clashes:
                kinds.append(kind)
        constraints: list[dict[str, object]] = []
        for chosen in kinds:
            made: dict[str, object] = {"type": chosen}
            if chosen in ("start", "end"):
                made["text"] = rng.choice(openings if chosen == "start" else closings)
            elif chosen == "include":
                made["text"] = rng.choice(ADJECTIVES)
            elif chosen == "max_words":
                made["words"] = rng.choice([15, 20, 25])
            constraints.append(made)
        rules = " ".join(f"{i}. {constraint_text(c)}" for i, c in enumerate(constraints, 1))
        sentences, city, answer, _ = _passage(rng, task.sentences, 1, None)
        rules = f"Follow these rules in your answer: {rules}"
        question = f"Question: What is the secret word in {city}?"
        passage = f"Text: {' '.join(sentences)}"
        parts = [rules, passage, question]
        if task.question == "first":
            parts = [rules, question, passage]
        worked = _obey(constraints, f"The secret word in {city} is {answer}.")
        spec = {"constraints": constraints, "fact": answer}
        return Question("\n\n".join(parts), worked, worked, spec)

    return _draw_all(task, seed, draw)


def _obey(constraints: list[dict[str, Any]], sentence: str) -> str:
    """A sentence made to follow the constraints."""
    by_kind = {constraint["type"]: constraint for constraint in constraints}
    text = sentence
    if "include" in by_kind:
        text = f"It is {by_kind['include']['text']}. {text}"
    if "start" in by_kind:
        text = f"{by_kind['start']['text']} {text}"
    if "end" in by_kind:
        text = f"{text} {by_kind['end']['text']}"
    if "quotes" in by_kind:
        text = f'"{text}"'
    if "uppercase" in by_kind:
        text = text.upper()
    if "lowercase" in by_kind:
        text = text.lower()
    return text


def _draw_all(
    task: Task, seed: int, draw: Callable[[random.Random], Question]
) -> tuple[Iterator[Question], list[Question]]:
    """Questions without end, and as many few-shot examples as asked."""

    def number(purpose: str, index: int) -> Question:
        digest = hex_digest(str(seed), task.name, purpose, str(index))
        return draw(random.Random(int(digest[:16], 16)))

    examples = [number("few-shot examples", index) for index in range(task.few_shot)]
    return (number("questions", index) for index in count()), examples


def _names(rng: random.Random, size: int) -> list[str]:
    """Different names of two words; neither word alone tells all of them apart."""
    names = [f"{adjective} {animal}" for adjective in ADJECTIVES for animal in ANIMALS]
    return rng.sample(names, size)


def _place(rng: random.Random, last: int, distance: float | None) -> int:
    """A place from 0 to ``last``: anywhere, or so far from the end as ``distance`` says."""
    return rng.randint(0, last) if distance is None else round((1 - distance) * last)


def _sentences(rng: random.Random, size: int) -> list[str]:
    """Different sentences that say nothing of what is asked."""
    combinations = len(_SUBJECTS) * len(_VERBS) * len(_OBJECTS)
    made = []
    for code in rng.sample(range(combinations), size):
        code, subject = divmod(code, len(_SUBJECTS))
        obj, verb = divmod(code, len(_VERBS))
        made.append(f"{_SUBJECTS[subject]} {_VERBS[verb]} {_OBJECTS[obj]}.")
    return made


def _with_filler(rng: random.Random, context: str, sentences: int) -> str:
    """The context, and between it and the question sentences that say nothing of it."""
    return "\n".join([context, *([" ".join(_sentences(rng, sentences))] if sentences else [])])


def _passage(
    rng: random.Random, sentences: int, facts: int, distance: float | None
) -> tuple[list[str], str, str, list[str]]:
    """Sentences with facts among them: (sentences, city asked for, its word, the other words)."""
    cities, secrets = rng.sample(CITIES, facts), rng.sample(NOUNS, facts)
    text = _sentences(rng, sentences)
    for city, word in list(zip(cities, secrets, strict=True))[1:]:
        text.insert(rng.randint(0, len(text)), f"In {city} the secret word is {word}.")
    place = _place(rng, len(text), distance)
    text.insert(place, f"In {cities[0]} the secret word is {secrets[0]}.")
    return text, cities[0], secrets[0], secrets[1:]


def _arrange(context: str, question: str, task: GeneratedTask) -> str:
    parts = [question, context] if task.question == "first" else [context, question]
    return "\n\n".join(parts)
