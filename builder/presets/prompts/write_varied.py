"""Writes varied.jsonl: prompts to calibrate on, of two dozen kinds, by templates over real topics.

The first are the hand-written ones of calibration.jsonl: activation ranges, which are measured on the first prompts of
a file, are the same for both files. The same prompts come out wherever it runs.

    python builder/presets/prompts/write_varied.py
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).parent
OUT = HERE / "varied.jsonl"

PER_CATEGORY = 44
SEED = 20

Rng = random.Random

# --- topics -----------------------------------------------------------------------------------------------------------

SCIENCE = """photosynthesis; plate tectonics; the Doppler effect; osmosis; natural selection; nuclear fusion
superconductivity
the greenhouse effect; the immune response to a virus; how vaccines work; the carbon cycle; black holes
gravitational waves
enzymes; mitosis; DNA replication; radioactive decay; entropy; the photoelectric effect; ocean currents
volcanic eruptions
the water cycle; antimatter; the periodic table; catalysts; semiconductors; lasers; fermentation; the nitrogen cycle
how the eye sees colour; tides; the formation of stars; continental drift; earthquakes; lightning; the ozone layer
blood clotting; how nerves carry signals; symbiosis; sound waves; magnetism; special relativity; acids and bases
crystallisation; the ice ages; coral bleaching; hibernation; bioluminescence; capillary action; surface tension"""

TECH = """hash tables; garbage collection; TCP handshakes; the domain name system; virtual memory
database indexes; recursion
containers; message queues; load balancers; caching; version control; compilers; floating point numbers
regular expressions
race conditions; deadlocks; REST interfaces; OAuth; web sockets; sorting networks; bloom filters; linked lists
event loops
neural networks; gradient descent; decision trees; overfitting; transformers in machine learning; public cloud regions
solid state drives; lithium batteries; touch screens; barcode scanners; noise cancelling headphones; electric motors
fibre optic cables; heat pumps; wind turbines; 3D printers; satellite internet; contactless payment
image compression"""

HISTORY = """the fall of Constantinople; the printing press; the Silk Road; the Black Death; the French Revolution
the Industrial Revolution; the Meiji Restoration; the Congress of Vienna; the abolition of slavery in Brazil
the Suez Canal
the Berlin Airlift; the partition of India; the Apollo programme; the Marshall Plan; the Cuban Missile Crisis
the Boxer Rebellion; the Hanseatic League; the Mongol Empire; the Inca road system; the Great Fire of London
the Reformation; the Thirty Years' War; the Haitian Revolution; the Opium Wars; women's suffrage in New Zealand
the Russian Revolution; the Spanish Civil War; the fall of the Berlin Wall; apartheid; the Velvet Revolution
the Library of Alexandria; the Punic Wars; the Viking settlements in Greenland; the Ottoman Empire; the Gold Rush
the Great Depression; the Chernobyl disaster; the construction of the Panama Canal; the Bronze Age collapse"""

SKILLS = """change a bicycle chain; prune roses; bake sourdough bread; paint a bedroom wall; set up a home router
repot an orchid; iron a linen shirt; train for a first 10 km run; learn to juggle; remove red wine from a carpet
fillet a trout; build a raised garden bed; clean a cast iron pan; write a cover letter
plan a week of vegetarian dinners
tune a ukulele; fold a fitted sheet; replace a kitchen tap; insulate a draughty window; pack for a three day hike
take better portraits with a phone; start a book club; learn touch typing; host a board game evening
file a noise complaint
propagate a basil plant; poach an egg; assemble a flat-pack wardrobe; unclog a shower drain; keep a beginner's aquarium
knit a simple scarf; prepare for a dentist appointment; move house with a cat; wax a snowboard; photograph the night sky
make yoghurt at home; read sheet music; teach a dog to stay; store potatoes over winter; bleed a radiator"""

PLACES = """Lisbon; Kyoto; Cape Town; Reykjavik; Buenos Aires; Hanoi; Marrakesh; Vancouver; Istanbul; Naples
Kraków; Bergen
Mexico City; Cusco; Zanzibar; Jaipur; Melbourne; Wellington; Dubrovnik; Granada; Edinburgh; Tallinn; Seville; Chicago
New Orleans; Montreal; Hamburg; Bruges; Ljubljana; Porto; Taipei; Seoul; Singapore; Tbilisi; Amman; Valparaíso"""

DISHES = """lentil soup; mushroom risotto; fish tacos; shakshuka; pad thai; ratatouille; chicken curry; potato gratin
borscht; tabbouleh; banana bread; gnocchi; falafel; miso ramen; apple strudel; paella; chili without beans; onion tart
pumpkin ravioli; bibimbap; jollof rice; empanadas; clam chowder; pierogi; moussaka; key lime pie; vegetable lasagne"""

JOBS = """nurse; electrician; tax adviser; museum guide; beekeeper; train driver; translator; carpenter; data analyst
florist; paramedic; primary school teacher; geologist; sound engineer; veterinarian; tailor; librarian; crane operator
dietitian; bus mechanic; court reporter; game designer; midwife; surveyor; pastry chef; air traffic controller"""

NAMES = """Amara; Bjorn; Chiara; Dmitri; Esther; Farid; Greta; Hiro; Imani; Jonas; Kavya; Leila; Mateo; Noor
Oskar; Priya
Quentin; Rosa; Samuel; Tomás; Uma; Viktor; Wen; Xenia; Yusuf; Zofia"""

PRODUCTS = """a waterproof hiking backpack; a cordless vacuum cleaner; a language learning app; noise cancelling earbuds
an electric scooter; a folding desk; a bread machine; a smart thermostat; a subscription box for tea
a solar phone charger
a reusable coffee cup; an online chess course; a weighted blanket; a bicycle child seat; a portable projector"""

OBJECTS = """a lighthouse; a broken watch; an old map; a red umbrella; a locked drawer; a borrowed violin; a paper boat
a stray cat; a letter without a sender; a greenhouse; a night train; a snow globe; a deserted fairground; a chess clock
a silver spoon; a ferry in the fog; a library card; a telescope; a music box; an abandoned mine; a lost glove
a bakery"""

MOODS = """hopeful; eerie; funny; wistful; tense; warm; dry and ironic; dreamy"""

DECISIONS = """take a job abroad or stay near the family; study part time while working
repair a ten year old car or sell it
adopt a second dog; lend money to a friend; move in with a partner after six months; give up a stable job to freelance
buy a used laptop or a new cheap one; tell a colleague that I found a mistake of theirs; learn piano at fifty
rent out the spare room; cancel a holiday because of bad weather forecasts; let a ten year old have a phone
invest savings or pay back a student loan first; go to a school reunion; keep a landline; homeschool for a year
switch from coffee to tea; take a sabbatical; join a gym or run outside; accept a counter-offer from my employer
cut contact with a rude relative; buy a house that needs work; change doctors
go vegetarian with a family that is not"""

LANGUAGES = """Spanish; German; Italian; Portuguese; Dutch; Polish; Swedish; Turkish; Japanese; Swahili"""

SENTENCES = """The museum is closed on Tuesdays.; Could I have the bill, please?; My suitcase has not arrived yet.
We are looking for a quiet place to work.; It will probably rain this afternoon.; She has lived here for twenty years.
Please turn off the lights when you leave.; I would like to exchange this jacket for a larger one.
The train leaves in ten minutes from platform four.; He forgot his keys again.; Do you have anything without nuts?
The meeting was moved to Thursday.; There is a leak under the sink.; How much does it cost to send this to Canada?
My daughter is allergic to penicillin.; The view from the tower is worth the climb.; We ran out of milk this morning."""

WORDS = """serendipity; bureaucracy; candid; entrepreneur; nostalgia; quarantine; sabotage; algebra; robot; melancholy
vaccine; disaster; tulip; magazine; shampoo; ketchup; ombudsman; kindergarten; avocado; boycott; silhouette; clue"""

COUNTRIES = (  # name, inhabitants in millions, area in thousand square kilometres, currency, longest river or lake
    ("Norway", 5.5, 385, "krone", "the Glomma"),
    ("Portugal", 10.4, 92, "euro", "the Tagus"),
    ("Chile", 19.6, 756, "peso", "the Loa"),
    ("Kenya", 55.1, 580, "shilling", "the Tana"),
    ("Vietnam", 98.9, 331, "dong", "the Mekong"),
    ("Peru", 34.4, 1285, "sol", "the Ucayali"),
    ("Poland", 36.7, 313, "złoty", "the Vistula"),
    ("Morocco", 37.8, 447, "dirham", "the Draa"),
    ("New Zealand", 5.2, 268, "dollar", "the Waikato"),
    ("Iceland", 0.4, 103, "króna", "the Þjórsá"),
    ("Ghana", 34.1, 239, "cedi", "Lake Volta"),
    ("Nepal", 30.9, 147, "rupee", "the Karnali"),
    ("Austria", 9.1, 84, "euro", "the Danube"),
    ("Colombia", 52.1, 1142, "peso", "the Magdalena"),
    ("Thailand", 71.8, 513, "baht", "the Chi"),
    ("Romania", 19.1, 238, "leu", "the Danube"),
)

PLANETS = (  # name, diameter in km, days of a year, moons
    ("Mercury", 4879, 88, 0),
    ("Venus", 12104, 225, 0),
    ("Mars", 6779, 687, 2),
    ("Jupiter", 139820, 4333, 95),
    ("Saturn", 116460, 10759, 146),
    ("Uranus", 50724, 30687, 28),
    ("Neptune", 49244, 60190, 16),
)

BOOKS = (
    ("Moby-Dick", "Herman Melville", 1851),
    ("Middlemarch", "George Eliot", 1871),
    ("Crime and Punishment", "Fyodor Dostoevsky", 1866),
    ("Frankenstein", "Mary Shelley", 1818),
    ("Don Quixote", "Miguel de Cervantes", 1605),
    ("Things Fall Apart", "Chinua Achebe", 1958),
    ("The Trial", "Franz Kafka", 1925),
    ("Pride and Prejudice", "Jane Austen", 1813),
    ("One Hundred Years of Solitude", "Gabriel García Márquez", 1967),
    ("Treasure Island", "Robert Louis Stevenson", 1883),
    ("The Tale of Genji", "Murasaki Shikibu", 1021),
    ("Madame Bovary", "Gustave Flaubert", 1857),
)

FUNCTIONS = """merges two sorted lists into one; finds the second largest number of a list
removes duplicates but keeps the order
converts Roman numerals to integers; flattens a nested list; validates an IPv4 address
groups words by their first letter
transposes a matrix; rotates a list by k places; counts the vowels of each line; finds all anagrams of a word in a list
computes the running average of numbers; parses a date such as 2024-03-09; splits a text into chunks of n characters
checks whether brackets are balanced; caesar-shifts a text; lists prime numbers up to n; computes the edit distance
formats seconds as hours, minutes and seconds; inverts a dictionary; finds the longest common prefix
simulates a dice roll
reads key=value lines into a map; evaluates a polynomial; draws a triangle of stars; computes compound interest
finds the shortest path in a grid; encodes a text by run lengths; checks a Sudoku row; converts Celsius to Fahrenheit"""

CODE_LANGUAGES = """Python; JavaScript; Go; Rust; Java; C; TypeScript; Ruby; Kotlin; C#"""

BUGS = (
    ("def mean(xs):\n    s = 0\n    for x in xs:\n        s =+ x\n    return s / len(xs)", "returns the last number"),
    ("for i in range(len(items)):\n    if items[i] < 0:\n        del items[i]", "raises IndexError"),
    ("def add(item, to=[]):\n    to.append(item)\n    return to", "remembers items of earlier calls"),
    ("let total = 0;\nprices.forEach(p => { total + p; });\nconsole.log(total);", "prints 0"),
    ("while (i < 10) {\n  console.log(i);\n}", "never ends"),
    ("int *make(void) {\n  int n = 5;\n  return &n;\n}", "gives garbage"),
    ("if (name = 'admin') {\n  grantAccess();\n}", "lets everybody in"),
    ("SELECT name, COUNT(*) FROM orders;", "is refused by the database"),
    ("try:\n    load(path)\nexcept:\n    pass", "hides why nothing is loaded"),
    ("func main() {\n  for i := 0; i < 3; i++ {\n    go fmt.Println(i)\n  }\n}", "prints nothing as a rule"),
    ("String a = read();\nif (a == \"yes\") run();", "never runs, whatever I type"),
    ("print('Total: ' + 3 * price)", "raises TypeError"),
    ("let v = vec![1, 2, 3];\nlet w = v;\nprintln!(\"{:?}\", v);", "does not compile"),
    ("for f in $(ls *.txt); do mv $f done/; done", "fails for names with spaces"),
)  # fmt: skip

TABLES = {
    "orders": "id, customer_id, placed_on, total",
    "employees": "id, name, department, salary, hired_on",
    "films": "id, title, director, year, minutes",
    "sensors": "sensor_id, measured_at, temperature",
    "loans": "book_id, member_id, borrowed_on, returned_on",
    "flights": "number, origin, destination, departs_at, seats",
}

QUERIES = {
    "orders": "the ten customers with the highest sum of totals; the average total by month; "
    "customers with more than one order on a day",
    "employees": "the best paid person of each department; how many were hired each year; "
    "departments whose average salary is above 50000",
    "films": "directors with at least three films; the longest film of each decade; titles that occur more than once",
    "sensors": "the daily minimum and maximum; sensors that sent nothing for a day; the hottest hour of each sensor",
    "loans": "books that are overdue for more than 30 days; the most borrowed book of last year; "
    "members without any loan",
    "flights": "pairs of cities with flights in both directions; the earliest departure from each origin; "
    "seats by destination",
}  # fmt: skip

LISTS = """renewable sources of energy; musical instruments of an orchestra; layers of the atmosphere; types of clouds
big cats; spices of Indian cooking; programming paradigms; Olympic winter sports; bones of the arm; kinds of pasta
moons of Jupiter; Nordic languages; board games for two; knots for sailors; citrus fruits; chess openings
types of bridges"""

PERSONAS = """a patient chess coach; a medieval blacksmith; a museum audio guide; a sceptical science editor
a night shift nurse
a Venetian gondolier; a job interviewer for a bank; a park ranger; a grumpy but helpful printer; a sommelier
a flight attendant
a detective novelist; a gardener in a royal palace; a strict grammar teacher; a tour guide on the Moon; a radio host"""

THINGS = """apples; pencils; tickets; bottles; tiles; notebooks; candles; bricks; chairs; stamps; marbles; bulbs"""


def _entries(text: str) -> list[str]:
    return [entry.strip() for line in text.splitlines() for entry in line.split(";") if entry.strip()]


def _pick(rng: Rng, *texts: str) -> list[str]:
    return [rng.choice(_entries(text)) for text in texts]


# --- kinds ------------------------------------------------------------------------------------------------------------


def explain(rng: Rng) -> str:
    """Something to be explained."""
    topic = rng.choice(_entries(SCIENCE) + _entries(TECH))
    return rng.choice(
        (
            f"Explain {topic} to a curious twelve-year-old.",
            f"can you explain {topic} in plain words? I know nothing about it",
            f"What are the most common misunderstandings about {topic}?",
            f"Give a short explanation of {topic}, then one example from daily life.",
            f"I have an exam tomorrow. Explain {topic} in about 100 words.",
            f"Use an analogy to explain {topic}.",
            f"Why does {topic} matter? Answer in three bullet points.",
        )
    )


def stem(rng: Rng) -> str:
    """An exercise in physics, chemistry or calculus."""
    kind = rng.randrange(7)
    a, b, c = rng.randint(2, 30), rng.randint(2, 20), rng.randint(2, 12)
    if kind == 0:
        return (
            f"A stone falls from rest for {a / 4:g} s. How far does it fall, without air resistance? Use g = 9.81 "
            "m/s^2."
        )
    if kind == 1:
        return (
            f"What current flows through a resistor of {10 * a} ohms at {b} volts, and what power is turned into heat?"
        )
    if kind == 2:
        return (
            f"How many grams of table salt are needed for {c / 4:g} litres of a {b / 10:g} molar solution? Show the "
            "steps."
        )
    if kind == 3:
        return (
            f"A lens has a focal length of {a} cm. Where is the image of an object that stands {a + b} cm in front "
            "of it?"
        )
    if kind == 4:
        return (
            f"A car of {100 * a} kg goes at {5 * b} km/h. What is its kinetic energy, and how far does it brake at "
            f"{c} m/s^2?"
        )
    if kind == 5:
        return f"Differentiate f(x) = {a}x^{c} - {b}x + {c} and say where its slope is zero."
    return f"A sample has a half-life of {a} days. What share of it is left after {a * c // 2} days?"


def mathematics(rng: Rng) -> str:
    """An exercise in arithmetic or algebra."""
    a, b, c, d = rng.randint(12, 98), rng.randint(3, 19), rng.randint(2, 9), rng.randint(11, 60)
    name, thing = _pick(rng, NAMES, THINGS)
    return rng.choice(
        (
            f"{name} has {a} {thing}, gives away {c} and then shares the rest equally with two friends. How "
            "many does each get?",
            f"Solve for x: {b}x + {a} = {d + a}",
            f"What is {a}% of {10 * d}?",
            f"Compute {a} * {b} - {d} and show each step.",
            f"A rectangle is {b} cm longer than it is wide, and its perimeter is {4 * d + 2 * b} cm. How big is "
            "its area?",
            f"A shop sells {thing} at {c} for {b} euros. What do {c * d} of them cost?",
            f"How many ways are there to put {c} {thing} in a row?",
            f"What is the greatest common divisor of {a * c} and {d * c}?",
            f"The mean of four numbers is {d}. Three of them are {d - c}, {d + b} and {d - 1}. What is the fourth?",
            f"Two trains leave towns that are {10 * a} km apart towards each other, at {d} and {d + b} km/h. "
            "When do they meet?",
        )
    )


def code(rng: Rng) -> str:
    """A function to be written."""
    language, does = _pick(rng, CODE_LANGUAGES, FUNCTIONS)
    return rng.choice(
        (
            f"Write a {language} function that {does}.",
            f"{language}: I need something that {does}. Please include a small test.",
            f"Show me how one {does.replace('s ', ' ', 1)} in {language}, with comments.",
            f"Write the shortest readable {language} code that {does}, and state its running time.",
            f"In {language}, write a function that {does}. It must handle empty input.",
        )
    )


def debug(rng: Rng) -> str:
    """A bug to be found."""
    snippet, symptom = rng.choice(BUGS)
    name = rng.choice(_entries(NAMES))
    return rng.choice(
        (
            f"This code {symptom}. Why, and how do I mend it?\n\n```\n{snippet}\n```",
            f"Find the bug:\n\n{snippet}",
            f"{name} reviewed my change and said that it {symptom}. Explain what is meant:\n\n{snippet}",
            f"Rewrite this so that it is correct, and say in one sentence what was wrong.\n\n{snippet}",
            f"```\n{snippet}\n```\nit {symptom} :( what am I missing",
        )
    )


def sql(rng: Rng) -> str:
    """A database to be asked."""
    table = rng.choice(list(TABLES))
    wanted = rng.choice(_entries(QUERIES[table]))
    dialect = rng.choice(("PostgreSQL", "SQLite", "MySQL", "standard SQL"))
    return rng.choice(
        (
            f"Table {table}({TABLES[table]}). Write a query in {dialect} for {wanted}.",
            f"In {dialect}, with a table {table} of the columns {TABLES[table]}: how do I get {wanted}?",
            f"Give me SQL for {wanted} ({table}: {TABLES[table]}) and explain each clause briefly.",
            f"Which index would make this fast in {dialect}, and why: {wanted}, from {table}({TABLES[table]})?",
        )
    )


def table(rng: Rng) -> str:
    """A table to be made or read."""
    if rng.random() < 0.5:
        rows = rng.sample(COUNTRIES, 4)
        head = "country,inhabitants (millions),area (1000 km2),currency"
        body = "\n".join(f"{name},{people},{area},{money}" for name, people, area, money, _ in rows)
        question = rng.choice(
            (
                "Which of these countries is the most densely populated? Show the numbers.",
                "Turn this into a Markdown table, sorted by area, the largest first.",
                f"By how much is {rows[0][0]} larger or smaller than {rows[1][0]}?",
                "Write two sentences that sum up this table.",
                "Convert this to JSON with short keys.",
            )
        )
    else:
        planets = rng.sample(PLANETS, 4)
        head = "planet;diameter in km;year in days;known moons"
        body = "\n".join(f"{name};{size};{days};{moons}" for name, size, days, moons in planets)
        question = rng.choice(
            (
                "Which planet has the longest year, and how long is it in Earth years?",
                "Sort the rows by diameter and write them as a list.",
                f"How many times does {planets[0][0]} fit beside itself across {planets[1][0]}, by diameter?",
                "Make a Markdown table of it and add a column with the number of moons in words.",
            )
        )
    return f"{question}\n\n{head}\n{body}"


def structured(rng: Rng) -> str:
    """An answer of a given form."""
    name, city, job = _pick(rng, NAMES, PLACES, JOBS)
    age, (title, author, year) = rng.randint(19, 71), rng.choice(BOOKS)
    return rng.choice(
        (
            f'Return only JSON with the keys name, age, city and job: "{name}, who is {age} and lives in '
            f'{city}, works as a {job}."',
            f"Write a YAML file with three {rng.choice(_entries(LISTS))}, each with a name and a one-line description.",
            f"Make an XML record of this book: {title} by {author}, first published in {year}.",
            f"Give the steps to {rng.choice(_entries(SKILLS))} as a JSON array of strings.",
            f"Write a CSV with five made-up {job}s: first name, years of experience, town.",
            f'Which fields are missing for a delivery? Answer as a list. "Parcel for {name}, {city}, fragile"',
        )
    )


def history(rng: Rng) -> str:
    """A question about an event."""
    event = rng.choice(_entries(HISTORY))
    return rng.choice(
        (
            f"What led to {event}?",
            f"Summarise {event} in four sentences.",
            f"Tell me three lesser known facts about {event}.",
            f"how did {event} change everyday life for ordinary people",
            f"Write a short timeline of {event}.",
            f"Who were the people that mattered most in {event}, and what did they want?",
        )
    )


def literature(rng: Rng) -> str:
    """A question about a book."""
    title, author, year = rng.choice(BOOKS)
    other = rng.choice([book for book in BOOKS if book[0] != title])
    return rng.choice(
        (
            f"What is {title} about? No spoilers please.",
            f"Compare {title} with {other[0]} in a short paragraph.",
            f"Recommend {title} to a friend who rarely reads, in three sentences.",
            f"Which themes does {author} treat in {title}?",
            f"Is {title} ({year}) hard to read? What should I know before I start?",
            f"Write a quiz question with four answers about {title}, and mark the right one.",
        )
    )


def compare(rng: Rng) -> str:
    """Two things to be compared."""
    a, b = rng.sample(_entries(rng.choice((TECH, DISHES, PLACES, JOBS))), 2)
    return rng.choice(
        (
            f"What do {a} and {b} have in common, and where do they differ?",
            f"{a} or {b}: pros and cons of each, as a table.",
            f"Compare {a} and {b} for somebody who knows neither.",
            f"If I could only learn about one of them, {a} or {b}, which should it be?",
        )
    )


def howto(rng: Rng) -> str:
    """A skill to be taught."""
    skill = rng.choice(_entries(SKILLS))
    return rng.choice(
        (
            f"How do I {skill}? Number the steps.",
            f"I have never tried to {skill}. What do beginners get wrong?",
            f"what do i need to {skill}, and how long does it take",
            f"Give me a checklist for when I {skill}.",
            f"Is it worth the trouble to {skill} myself, or should I ask a professional?",
        )
    )


def recipe(rng: Rng) -> str:
    """A question about a dish."""
    dish = rng.choice(_entries(DISHES))
    guests, minutes = rng.randint(2, 12), rng.choice((20, 30, 45, 60, 90))
    return rng.choice(
        (
            f"A recipe for {dish} for {guests} people, please.",
            f"I have {minutes} minutes. Can I make {dish}? How?",
            f"What can I use instead of butter and eggs in {dish}?",
            f"Write a shopping list for {dish} for {guests}.",
            f"what goes well with {dish}? two side dishes and a drink",
            f"My {dish} always turns out bland. What could I change?",
        )
    )


def travel(rng: Rng) -> str:
    """A question about a place."""
    place, days = rng.choice(_entries(PLACES)), rng.randint(2, 7)
    return rng.choice(
        (
            f"Plan {days} days in {place} for a family with two children.",
            f"What should I know about tipping and opening hours in {place}?",
            f"I'm in {place} for {days} days and hate crowds. Where should I go?",
            f"Describe a morning walk through {place}.",
            f"best time of the year for {place}? I like mild weather",
            f"List five things to eat in {place} and say what each is.",
        )
    )


def summarise(rng: Rng) -> str:
    """A passage to be summarised."""
    name, other, city, job = _pick(rng, NAMES, NAMES, PLACES, JOBS)
    product, number = rng.choice(_entries(PRODUCTS)), rng.randint(12, 480)
    passages = (
        f"{name} opened a small workshop in {city} {rng.randint(3, 30)} years ago, after working as a {job} for "
        "most of a "
        f"decade. At first hardly anybody came. Then a neighbour, {other}, wrote about it on the notice board "
        "of the local "
        f"library, and within a month {number} people had signed up for courses. Today the workshop has three "
        "rooms, two "
        f"employees and a waiting list. The rent was raised twice last year, and {name} is looking for a place "
        "outside the "
        "centre, which some of the regulars are against.",
        f"The review board tested {product} with {number} volunteers over {rng.randint(2, 9)} weeks. Most of "
        "them used it "
        f"every day. {rng.randint(51, 92)} percent said that they would buy it again, although nearly half had "
        "trouble with "
        "the instructions, which were only printed in small type. Two devices failed within the first week and were "
        "replaced free of charge. The board recommends it with reservations, and asks the maker for clearer "
        "instructions "
        "and a longer guarantee.",
        f"On {rng.choice(('Monday', 'Wednesday', 'Friday'))} the council of {city} discussed whether the old "
        "tram depot "
        f"should become a market hall. The architect, {name}, showed drawings with {number} stalls, a nursery "
        "and a roof "
        f"garden. A speaker for the residents, {other}, welcomed the plan but feared for the parking spaces. "
        "The treasurer "
        "pointed out that the roof alone would cost more than the yearly budget for schools. The council voted "
        "to ask for a "
        "cheaper variant by spring.",
    )
    asks = (
        "Summarize in one sentence:",
        "What are the main points? Use bullets.",
        "tl;dr please",
        "Sum this up for somebody who has ten seconds:",
        "Write a headline and a two-sentence summary.",
    )
    return f"{rng.choice(asks)}\n\n{rng.choice(passages)}"


def extract(rng: Rng) -> str:
    """Facts to be found in a text."""
    name, other, city, town = _pick(rng, NAMES, NAMES, PLACES, PLACES)
    day, hour, price = rng.randint(1, 28), rng.randint(8, 19), rng.randint(15, 900)
    month = rng.choice(("March", "May", "July", "September", "November"))
    text = rng.choice(
        (
            f"Hi, this is {name}. The delivery for {city} was promised for {day} {month}, {hour}:30, and cost "
            f"{price} euros. "
            f"It went to {town} instead. {other} signed for it. Please call me back.",
            f"Minutes, {day} {month}: present were {name} and {other}. It was decided to spend {price} euros on "
            "repairs in "
            f"{city}; the office in {town} stays as it is. Next meeting at {hour}:00.",
            f"{name} flew from {city} to {town} on {day} {month} and met {other} at {hour}:15. The tickets were "
            f"{price} "
            "dollars each, which the company refunded a week later.",
        )
    )
    ask = rng.choice(
        (
            "List all names and places.",
            "What is the date, and how much money is mentioned?",
            "Who did what? Answer with one line for each person.",
            "Extract time, date, place and amount as key: value lines.",
            "Is anybody complaining? Quote the sentence that shows it, or say no.",
        )
    )
    return f"{ask}\n\n{text}"


def rewrite(rng: Rng) -> str:
    """A text to be written in another way."""
    name, product, job = _pick(rng, NAMES, PRODUCTS, JOBS)
    text = rng.choice(
        (
            f"hey {name.lower()} the thing u sold me ({product}) stopped working after 2 days, thats a joke, "
            "money back pls",
            f"We regret to inform you that due to unforeseen circumstances the {job} will not be in a position "
            "to attend.",
            f"I have bought {product} and I have used it and I have liked it and I think other people will like "
            "it as well.",
            f"{name} didn't never told nobody about the meeting who was yesterday.",
            f"It is the opinion of the undersigned that {product} could, in some cases, perhaps be of a certain "
            "usefulness.",
        )
    )
    ask = rng.choice(
        (
            "Make this friendlier",
            "Correct the mistakes",
            "Rewrite this in half as many words",
            "Turn this into formal English",
            "Say this so that a child understands it",
            "Rewrite it as a haiku",
        )
    )
    return f"{ask}: {text}" if rng.random() < 0.5 else f"{ask}.\n\n{text}"


def translate(rng: Rng) -> str:
    """A sentence to be translated."""
    sentence, language, other = _pick(rng, SENTENCES, LANGUAGES, LANGUAGES)
    return rng.choice(
        (
            f'Translate into {language}: "{sentence}"',
            f'How would one say "{sentence}" in {language}? Add how it is pronounced.',
            f'Translate "{sentence}" into {language} and explain the grammar of the first word.',
            f"{sentence} <- in {language} pls",
            f"Teach me five words in {language} that have to do with "
            f"{rng.choice(('food', 'travel', 'weather', 'work'))}.",
            f"What are typical mistakes of people from England who learn {other}?",
        )
    )


def words(rng: Rng) -> str:
    """A question about words."""
    a, b = rng.sample(_entries(WORDS), 2)
    return rng.choice(
        (
            f"Where does the word {a} come from?",
            f"Use {a} and {b} in one sentence that makes sense.",
            f"Give three synonyms of {a}, and say how they differ from it.",
            f"Define {a} without using any word of more than two syllables.",
            f"what does {a} mean? and is it the same as {b}",
        )
    )


def letter(rng: Rng) -> str:
    """A letter to be written."""
    name, product, job, city = _pick(rng, NAMES, PRODUCTS, JOBS, PLACES)
    return rng.choice(
        (
            f"Write a short email to {name}: {product} that I ordered has not come, and I need it before Friday.",
            f"Draft a letter of application as a {job} in {city}.",
            f"Invite {name} and the rest of the team to a farewell lunch for our {job}. Keep it light.",
            f"write a polite no to {name} who wants me to help move house this weekend",
            f"Write an announcement for customers: {product} costs 5 % more from next month.",
            f"Compose a letter of thanks to the {job} who helped my mother in {city}.",
        )
    )


def story(rng: Rng) -> str:
    """A story or a poem to be written."""
    thing, mood, name, place, job = _pick(rng, OBJECTS, MOODS, NAMES, PLACES, JOBS)
    return rng.choice(
        (
            f"A {mood} story in under 150 words, with {thing} and {name}.",
            f"Write the first paragraph of a novel that is set in {place} and begins with {thing}.",
            f"Write a poem about {thing}. The mood should be {mood}.",
            f"A dialogue between a {job} and a child who has found {thing}.",
            f"limerick about a {job} from {place}",
            f"Describe {thing} without naming it.",
        )
    )


def ideas(rng: Rng) -> str:
    """Ideas to be found."""
    product, job, place, thing = _pick(rng, PRODUCTS, JOBS, PLACES, OBJECTS)
    count = rng.randint(3, 9)
    return rng.choice(
        (
            f"{count} slogans for {product}",
            f"Suggest {count} presents for a {job} who has everything.",
            f"How could a cafe in {place} attract more guests in winter? {count} ideas.",
            f"Think of {count} titles for a short film about {thing}.",
            f"What could one build from {count * 10} wine corks?",
            f"Give me {count} questions to ask a {job} in a podcast.",
        )
    )


def advice(rng: Rng) -> str:
    """A decision to be made."""
    decision, name = _pick(rng, DECISIONS, NAMES)
    return rng.choice(
        (
            f"Should I {decision}? What would you ask yourself first?",
            f"I can't decide whether to {decision}. Help me think it through.",
            f"{name} wants to {decision}. I think it is a mistake. How do I say so kindly?",
            f"pros and cons: {decision}",
            f"What would speak against it if I {decision}?",
        )
    )


def roleplay(rng: Rng) -> str:
    """A part to be played."""
    persona, product, name, place = _pick(rng, PERSONAS, PRODUCTS, NAMES, PLACES)
    return rng.choice(
        (
            f"You are {persona}. Greet me and ask me one question.",
            f"Be {persona}. I say: I have lost {product} somewhere in {place}.",
            f"Pretend to be {persona} and describe your day.",
            f"You are {persona}, I am {name}, your apprentice. I am late for the third time. Begin.",
            f"Act as {persona}. Convince me to visit {place}.",
        )
    )


def logic(rng: Rng) -> str:
    """A riddle."""
    a, b, c, d = rng.sample(_entries(NAMES), 4)
    return rng.choice(
        (
            f"{a} is taller than {b}. {c} is shorter than {b}. {d} is taller than {a}. Who is the shortest?",
            f"{a}, {b} and {c} each own one pet: a cat, a parrot, a tortoise. {a} is afraid of birds. {b} owns "
            "the cat. Who owns what?",
            f"If all of {a}'s books are novels and no novel is dull, can one of {a}'s books be dull? Explain.",
            f"{a} says that {b} lies. {b} says that {c} lies. {c} says that both others lie. Who can be telling "
            "the truth?",
            f"What comes next: {rng.randint(2, 5)}, {rng.randint(6, 9)}, {rng.randint(11, 14)}? Name a rule "
            "that fits, and one more that does.",
            f"{a} sits left of {b}, {c} is not at an end, {d} is at the right end. Give the order of the four.",
        )
    )


def listing(rng: Rng) -> str:
    """A list to be made."""
    what, count = rng.choice(_entries(LISTS)), rng.randint(4, 10)
    return rng.choice(
        (
            f"List {count} {what} with a short note on each.",
            f"Which {what} should everybody know?",
            f"Sort some {what} into groups and say by what.",
            f"{what}: name {count}, one a line, nothing else",
            f"Make flash cards about {what}: question, then answer. {count} of them.",
        )
    )


KINDS: dict[str, Callable[[Rng], str]] = {
    "advice": advice,
    "brainstorm": ideas,
    "code": code,
    "compare": compare,
    "creative": story,
    "debug": debug,
    "email": letter,
    "explain": explain,
    "extract": extract,
    "history": history,
    "howto": howto,
    "language": words,
    "list": listing,
    "literature": literature,
    "logic": logic,
    "math": mathematics,
    "recipe": recipe,
    "rewrite": rewrite,
    "roleplay": roleplay,
    "sql": sql,
    "stem": stem,
    "structured": structured,
    "summarise": summarise,
    "table": table,
    "translate": translate,
    "travel": travel,
}


def lines() -> Iterator[str]:
    """Those of the file: an id, a category and a prompt each, no prompt twice."""
    yield from (HERE / "calibration.jsonl").read_text().splitlines()
    rng, seen = Rng(SEED), set[str]()
    made = []
    for category, make in KINDS.items():
        count = 0
        while count < PER_CATEGORY:
            prompt = make(rng)
            if prompt not in seen:
                seen.add(prompt)
                made.append((category, prompt))
                count += 1
    rng.shuffle(made)
    for number, (category, prompt) in enumerate(made, start=1):
        yield json.dumps({"id": f"var-{number:04d}", "category": category, "prompt": prompt}, ensure_ascii=False)


if __name__ == "__main__":
    OUT.write_text("\n".join(lines()) + "\n")
