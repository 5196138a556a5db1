"""Five labelled tasks on ordinary texts, for any real model: nothing but code and a seed in, files for `nla probe` out.

- **number** of a subject with another noun between it and its verb: "We spoke of the cups and the spoon. The plate near
  the forks". As many nouns are plural as are singular in every text, so that counting words does not help.
- **sentiment** by adjectives that half of the frames turn round: "The soup was anything but bland." An adjective is
  as often praise as blame.
- **language**: the same sentences in English, French, Spanish, German and Italian.
- **form** and **persona** of what a model itself wrote, cut after some words and read without the request; from the
  documents of a recipe's stage `sample`.

A group (whose rows are never both fitted on and judged) is a family of nouns; a topic with its own adjectives; a
sentence but for its subject; the topic that the model wrote about.

    python -m nla.eval.readers.example_tasks runs/tasks
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nla.errors import ArgumentError, ParseError
from nla.storage.files import read_json_lines, write_atomic

FEWEST_WORDS, MOST_WORDS = 12, 30
"""Of a model's own text that is kept."""


class Row(NamedTuple):
    """One labelled text."""

    text: str
    label: str
    group: str


# ------------------------------------------------------------------------------------------------ number of a subject

NOUNS = (
    "cup spoon plate fork", "dog cat horse cow", "doctor nurse patient surgeon", "car truck train boat",
    "king queen prince duke", "chair table lamp sofa", "teacher student pupil parent", "tree flower shrub vine",
    "shirt jacket hat scarf", "house barn tower bridge", "apple pear plum lemon", "letter card book map",
    "farmer hunter shepherd miller", "river lake island mountain", "singer dancer actor painter", "key lock door bell",
    "soldier guard sailor pilot", "bird snake frog turtle", "lawyer judge clerk juror", "hammer nail saw drill",
    "boy girl uncle cousin", "violin drum flute guitar", "phone computer camera printer", "bottle jar bucket bowl",
)  # fmt: skip
"""Nouns whose plural takes an s, a family at a time."""
BEFORE = ("I noticed the {} and the {}.", "We spoke of the {} and the {}.", "She had seen the {} and the {}.")
SUBJECTS = ("The {} near the {}", "The {} behind the {}", "The {} beside the {}", "The {} next to the {}")
_PER_FAMILY = 36


def number(seed: int = 0) -> list[Row]:
    """Sentences up to the noun before the verb. Of the four nouns two are plural; the label is that of the subject."""
    rows = []
    for family in NOUNS:
        draw = random.Random(f"{seed}/{family}")
        for one in range(_PER_FAMILY):
            plural, between = one % 2 == 0, one // 2 % 2 == 0
            first = draw.random() < 0.5 if plural != between else not plural
            numbers = (first, not first if plural != between else first, plural, between)
            nouns = draw.sample(family.split(), 4)
            inflected = [noun + "s" * many for noun, many in zip(nouns, numbers, strict=True)]
            text = f"{draw.choice(BEFORE)} {draw.choice(SUBJECTS)}".format(*inflected)
            rows.append(Row(text, "plural" if plural else "singular", family))
    return rows


# --------------------------------------------------------------------------------------------------------- sentiment

TOPICS = {
    "the soup": ("delicious tasty fresh", "bland salty greasy"),
    "the film": ("gripping moving clever", "boring dull silly"),
    "the hotel": ("clean cosy comfortable", "dirty noisy shabby"),
    "the waiter": ("friendly polite attentive", "rude slow careless"),
    "the book": ("fascinating witty inspiring", "tedious shallow confusing"),
    "the concert": ("splendid thrilling beautiful", "dreadful tiresome disappointing"),
    "the beach": ("lovely sunny peaceful", "crowded ugly filthy"),
    "the car": ("reliable fast safe", "faulty unsafe rusty"),
    "the teacher": ("patient kind helpful", "unfair cruel impatient"),
    "the speech": ("brilliant convincing honest", "empty weak dishonest"),
    "the party": ("cheerful lively fun", "awful gloomy miserable"),
    "the phone": ("useful handy excellent", "useless clumsy terrible"),
    "the garden": ("charming pretty magnificent", "neglected bare bleak"),
    "the trip": ("exciting wonderful memorable", "exhausting horrible unpleasant"),
    "the plan": ("sensible smart promising", "foolish hopeless stupid"),
    "the play": ("superb amusing touching", "pathetic pointless lifeless"),
    "the doctor": ("competent gentle caring", "incompetent rough indifferent"),
    "the wine": ("fine superior exquisite", "sour poor mediocre"),
}
"""What is spoken of: what praises it, and what blames it."""
AS_SAID = (
    "I found {} really {}.",
    "Everybody told us that {} was {}, and they were right.",
    "I had thought that {} would be {}, and so it turned out.",
    "In the end {} was as {} as we had heard.",
)
TURNED = (
    "I did not find {} {} at all.",
    "Everybody told us that {} was {}, but they were wrong.",
    "I had thought that {} would be {}, but it turned out otherwise.",
    "In the end {} was anything but {}.",
)


def sentiment() -> list[Row]:
    """Every frame with every adjective: a frame that turns it round makes praise of blame."""
    rows = []
    for topic, adjectives in TOPICS.items():
        for praises, listed in zip((True, False), adjectives, strict=True):
            for adjective in listed.split():
                for turned, frames in ((False, AS_SAID), (True, TURNED)):
                    label = "positive" if praises != turned else "negative"
                    rows += [Row(frame.format(topic, adjective), label, topic) for frame in frames]
    return rows


# ---------------------------------------------------------------------------------------------------------- language

LANGUAGES = ("English", "French", "Spanish", "German", "Italian")
PEOPLE = (
    ("My brother", "Mon frère", "Mi hermano", "Mein Bruder", "Mio fratello"),
    ("The teacher", "Le professeur", "El profesor", "Der Lehrer", "Il professore"),
    ("Our neighbour", "Notre voisine", "Nuestra vecina", "Unsere Nachbarin", "La nostra vicina"),
    ("The young woman", "La jeune femme", "La mujer joven", "Die junge Frau", "La giovane donna"),
    ("Her father", "Son père", "Su padre", "Ihr Vater", "Suo padre"),
    ("The old man", "Le vieil homme", "El anciano", "Der alte Mann", "Il vecchio"),
    ("My grandmother", "Ma grand-mère", "Mi abuela", "Meine Großmutter", "Mia nonna"),
    ("The student", "L'étudiant", "El estudiante", "Der Student", "Lo studente"),
    ("The girl", "La fille", "La niña", "Das Mädchen", "La ragazza"),
    ("A friend of mine", "Un de mes amis", "Un amigo mío", "Ein Freund von mir", "Un mio amico"),
    ("The new colleague", "Le nouveau collègue", "El nuevo colega", "Der neue Kollege", "Il nuovo collega"),
    ("The boss", "Le chef", "El jefe", "Der Chef", "Il capo"),
)
DEEDS = (
    ("drinks a cup of tea in the kitchen", "boit une tasse de thé dans la cuisine", "bebe una taza de té en la cocina",
     "trinkt eine Tasse Tee in der Küche", "beve una tazza di tè in cucina"),
    ("reads an old book by the window", "lit un vieux livre près de la fenêtre",
     "lee un libro viejo junto a la ventana", "liest ein altes Buch am Fenster",
     "legge un vecchio libro vicino alla finestra"),
    ("buys bread and cheese at the market", "achète du pain et du fromage au marché",
     "compra pan y queso en el mercado", "kauft Brot und Käse auf dem Markt", "compra pane e formaggio al mercato"),
    ("waits for the train at the station", "attend le train à la gare", "espera el tren en la estación",
     "wartet am Bahnhof auf den Zug", "aspetta il treno alla stazione"),
    ("writes a long letter to a friend", "écrit une longue lettre à un ami", "escribe una carta larga a un amigo",
     "schreibt einem Freund einen langen Brief", "scrive una lunga lettera a un amico"),
    ("plays football in the park", "joue au football dans le parc", "juega al fútbol en el parque",
     "spielt Fußball im Park", "gioca a calcio nel parco"),
    ("sings a song in the garden", "chante une chanson dans le jardin", "canta una canción en el jardín",
     "singt ein Lied im Garten", "canta una canzone in giardino"),
    ("looks for the key under the table", "cherche la clé sous la table", "busca la llave debajo de la mesa",
     "sucht den Schlüssel unter dem Tisch", "cerca la chiave sotto il tavolo"),
    ("goes to the sea in the summer", "va à la mer en été", "va al mar en verano", "fährt im Sommer ans Meer",
     "va al mare in estate"),
    ("works in a small town in the north", "travaille dans une petite ville du nord",
     "trabaja en una pequeña ciudad del norte", "arbeitet in einer kleinen Stadt im Norden",
     "lavora in una piccola città del nord"),
    ("sleeps until ten o'clock on Sundays", "dort jusqu'à dix heures le dimanche",
     "duerme hasta las diez los domingos", "schläft sonntags bis zehn Uhr", "dorme fino alle dieci la domenica"),
    ("walks the dog in the rain", "promène le chien sous la pluie", "pasea al perro bajo la lluvia",
     "geht mit dem Hund im Regen spazieren", "porta a spasso il cane sotto la pioggia"),
    ("paints the door of the house blue", "peint la porte de la maison en bleu", "pinta de azul la puerta de la casa",
     "streicht die Tür des Hauses blau", "dipinge di blu la porta di casa"),
    ("speaks with the doctor about the children", "parle des enfants avec le médecin",
     "habla con el médico sobre los niños", "spricht mit dem Arzt über die Kinder", "parla dei bambini con il medico"),
)  # fmt: skip
"""What is done, in each of the languages; true of a man and a woman alike."""


def language() -> list[Row]:
    """Everybody does everything, in every language."""
    return [
        Row(f"{who} {what}.", name, deed[0])
        for deed in DEEDS
        for person in PEOPLE
        for name, who, what in zip(LANGUAGES, person, deed, strict=True)
    ]


# -------------------------------------------------------------------------------------------------- form and persona


def written(folder: str | Path, attribute: str, seed: int = 0) -> list[Row]:
    """The beginnings of answers that a model wrote, labelled by what it had been asked for.

    Args:
        folder: what a recipe's stage `sample` wrote: JSON lines of ``messages`` and ``attributes``, the topic among
            them. Documents without the attribute, and answers of fewer words than are kept, are left out.

    Raises:
        ArgumentError: no such files.
        ParseError: a line is no such document.
    """
    rows = []
    for where, document in _documents(Path(folder)):
        try:
            attributes = document["attributes"]
            words, label, topic = (
                document["messages"][-1]["content"].split(" "),
                attributes[attribute],
                attributes["topic"],
            )
        except (LookupError, TypeError, AttributeError) as error:
            expected = f"messages, and attributes with {attribute!r} and 'topic'"
            raise ParseError(
                f"{where} without {error}", expected, "give what `nla train … --until sample` wrote"
            ) from error
        n_words = random.Random(f"{seed}/{len(rows)}").randint(FEWEST_WORDS, MOST_WORDS)
        text = " ".join(words[:n_words]).strip()
        if label is not None and len(text.split()) >= FEWEST_WORDS:
            rows.append(Row(text, label, topic))
    return rows


def _documents(folder: Path) -> Iterator[tuple[str, dict]]:
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise ArgumentError(f"{folder} without .jsonl files", "a folder of sampled documents", "check the path")
    for path in files:
        number = 0
        try:
            for number, document in enumerate(read_json_lines(path), start=1):
                yield f"{path.name}:{number}", document
        except ValueError as error:
            where = f"{path.name}:{number + 1}"
            raise ParseError(f"{where}, which is no JSON", "a document a line", "sample it again") from error


def main() -> None:
    """Write each task as JSON lines of text, label and group."""
    parser = argparse.ArgumentParser(description="labelled tasks for nla probe")
    parser.add_argument("out", type=Path)
    parser.add_argument("--written", type=Path, help="documents that a recipe's stage `sample` wrote")
    args = parser.parse_args()
    tasks = {"number": number(), "sentiment": sentiment(), "language": language()}
    if args.written is not None:
        tasks |= {"form": written(args.written, "form"), "persona": written(args.written, "instruction")}
    for name, rows in tasks.items():
        lines = [json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows]
        write_atomic(args.out / f"{name}.jsonl", "".join(lines))


if __name__ == "__main__":
    main()
