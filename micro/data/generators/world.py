"""Background knowledge, cause and effect, from tables of plain facts."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from micro.data.generators.scene import Slots, Template


def _rows(names: str, table: str) -> Callable[[Random, Slots], Slots]:
    """Draws one row of a table: lines of fields between bars, called `names`."""
    keys = names.split()
    rows = [dict(zip(keys, (f.strip() for f in line.split("|")), strict=True)) for line in table.strip().splitlines()]
    return lambda rng, _: dict(rng.choice(rows))


_COUNTRY = _rows(
    "country capital continent money",
    """
    France | Paris | Europe | euros
    Japan | Tokyo | Asia | yen
    Kenya | Nairobi | Africa | shillings
    Peru | Lima | South America | soles
    Norway | Oslo | Europe | kroner
    Egypt | Cairo | Africa | pounds
    Thailand | Bangkok | Asia | baht
    Poland | Warsaw | Europe | zlotys
    Mexico | Mexico City | North America | pesos
    India | New Delhi | Asia | rupees
    Ghana | Accra | Africa | cedis
    Hungary | Budapest | Europe | forints
    Vietnam | Hanoi | Asia | dong
    Morocco | Rabat | Africa | dirhams
    """,
)
_RIVER = _rows(
    "river region mouth",
    """
    Nile | Egypt | the Mediterranean
    Rhine | Germany | the North Sea
    Danube | Hungary | the Black Sea
    Ganges | India | the Bay of Bengal
    Amazon | Brazil | the Atlantic
    Mekong | Laos | the South China Sea
    Volga | Russia | the Caspian Sea
    Vistula | Poland | the Baltic
    """,
)
_MELT = _rows(
    "stuff melting",
    """
    ice | 0
    tin | 232
    lead | 327
    zinc | 420
    aluminium | 660
    silver | 962
    gold | 1064
    copper | 1085
    iron | 1538
    """,
)
_ANIMAL = _rows(
    "animals home food",
    """
    penguins | on cold southern coasts | fish
    beavers | beside rivers | bark and leaves
    camels | in dry deserts | thorny plants
    koalas | in Australian forests | eucalyptus leaves
    otters | along clean streams | fish and crabs
    pandas | in Chinese mountain forests | bamboo
    owls | in old trees and barns | mice
    seals | on rocky shores | fish
    squirrels | in woods and parks | nuts and seeds
    """,
)
_PLANET = _rows(
    "planet rank year",
    """
    Mercury | first | 88 days
    Venus | second | 225 days
    Mars | fourth | almost two years
    Jupiter | fifth | twelve years
    Saturn | sixth | 29 years
    Uranus | seventh | 84 years
    Neptune | eighth | 165 years
    """,
)
_CAUSE = _rows(
    "cause effect",
    """
    warm moist air rises and cools | its water condenses into clouds
    iron lies in damp air | it slowly turns to rust
    two plates of the earth slip | the ground shakes
    the moon stands between sun and earth | the sunlight is blocked
    yeast eats sugar in the dough | gas bubbles make the bread rise
    salt is strewn on an icy road | the ice melts below zero
    plants get no light | their leaves turn pale
    lightning heats the air in a flash | the air expands and thunder rolls
    milk is kept warm for days | bacteria turn it sour
    metal is heated | it expands a little
    """,
)
_JOB = _rows(
    "job work",
    """
    baker | bakes bread in a hot oven early in the morning
    miner | digs coal or ore out of the ground
    surgeon | operates on patients in a hospital
    sailor | works on ships that cross the sea
    farmer | grows grain and keeps cattle
    smith | forges hot iron with a hammer
    judge | decides cases in a court
    potter | shapes bowls on a turning wheel
    """,
)
_SOUTH = _rows("southern", "Australia\nChile\nArgentina\nSouth Africa\nNew Zealand\nUruguay\nNamibia\nBotswana")
_FLOAT = _rows(
    "solid verb why",
    """
    wood | floats on | lighter than the same volume of water
    cork | floats on | full of tiny pockets of air
    ice | floats on | less dense than liquid water
    stone | sinks in | denser than water
    steel | sinks in | almost eight times as dense as water
    glass | sinks in | heavier than the same volume of water
    """,
)
_AGE = _rows(
    "invention century",
    """
    steam locomotive | nineteenth
    telephone | nineteenth
    bicycle | nineteenth
    telescope | seventeenth
    pendulum clock | seventeenth
    hot-air balloon | eighteenth
    transistor | twentieth
    microwave oven | twentieth
    """,
)
_MOUNTAIN = _rows(
    "mountain range height",
    """
    Mount Everest | the Himalayas | 8,849
    Aconcagua | the Andes | 6,961
    Mont Blanc | the Alps | 4,806
    Elbrus | the Caucasus | 5,642
    Denali | the Alaska Range | 6,190
    Toubkal | the Atlas | 4,167
    """,
)
_ORGAN = _rows(
    "organ does",
    """
    heart | pumps blood through the vessels
    liver | cleans the blood and makes bile
    lungs | take up oxygen from the air
    kidneys | filter waste out of the blood
    stomach | breaks food down with acid
    skin | keeps germs out and heat in
    """,
)
_CROP = _rows(
    "crop climate lands",
    """
    coffee | warm highlands | Brazil and Ethiopia
    rice | flooded fields | China and India
    olives | mild dry summers | Spain and Greece
    cocoa | hot wet forests | Ghana and Ivory Coast
    dates | hot oases | Egypt and Iraq
    tea | rainy hillsides | Sri Lanka and Kenya
    """,
)
_SKY = _rows(
    "event reason",
    """
    tides rise and fall | the moon pulls on the oceans
    day turns into night | the earth spins round its axis
    stars twinkle | their light passes through moving air
    the moon shows phases | the sun lights it from changing sides
    the sky looks blue | air scatters blue light the most
    comets grow tails | sunlight turns their ice into gas
    """,
)
_SPEED = _rows(
    "wave medium rate",
    """
    sound | air | 340 metres
    sound | water | 1,480 metres
    sound | steel | 5,900 metres
    light | empty space | 300,000 kilometres
    """,
)
_GAS = _rows(
    "gas share purpose",
    """
    nitrogen | most of the air | to cool and to make fertiliser
    oxygen | a fifth of the air | in welding and in hospitals
    argon | about one per cent of the air | to fill lamps
    helium | much of the sun | to lift balloons
    carbon dioxide | a tiny part of the air | to make drinks fizzy
    """,
)
_NATION = _rows(
    "nation tongue neighbour",
    """
    Brazil | Portuguese | Argentina
    Austria | German | Hungary
    Portugal | Portuguese | Spain
    Colombia | Spanish | Brazil
    Iraq | Arabic | Iran
    Belarus | Russian | Poland
    """,
)

TRAIN = (
    Template(
        "material",
        "What is the {thing} of {a} made of?",
        "{things} like this one are usually made of {material}, which {about}.",
    ),
    Template(
        "capital",
        "{a} travels to {capital}. Where is that?",
        "{capital} is the capital of {country} in {continent}.",
        _COUNTRY,
    ),
    Template(
        "money",
        "{a} wants to buy {k} {things} in {country}. How does one pay there?",
        "people in {country} pay with {money}, also in the shops and markets of {capital}.",
        _COUNTRY,
    ),
    Template("river", "Where does the {river} end?", "the {river} flows through {region} and ends in {mouth}.", _RIVER),
    Template(
        "melting",
        "When does {stuff} melt?",
        "{stuff} melts at about {melting} degrees Celsius under normal pressure.",
        _MELT,
    ),
    Template(
        "animal",
        "{a} read about {animals} on {day}. How do they live?",
        "{animals} live {home} and feed on {food}.",
        _ANIMAL,
    ),
    Template(
        "planet",
        "What is {planet}?",
        "{planet} is the {rank} planet from the sun and takes {year} for one orbit.",
        _PLANET,
    ),
    Template("cause", "What happens when {cause}?", "when {cause}, {effect}.", _CAUSE),
    Template("job", "{b} would like to be a {job}. What is that?", "a {job} {work}.", _JOB),
    Template(
        "south",
        "{a} flies to {southern} in January. Is it cold?",
        "in {southern} January is a summer month, because the southern half of the earth then leans towards the sun.",
        _SOUTH,
    ),
    Template("float", "What does {solid} do in water?", "{solid} {verb} water, because it is {why}.", _FLOAT),
    Template(
        "age",
        "{a} saw an old {invention} in the {place}. When did it come up?",
        "the first {invention} was built in the {century} century.",
        _AGE,
    ),
    Template(
        "sunlight",
        "Why did the {colour} {thing} fade at the window?",
        "strong sunlight bleaches many dyes, so a {colour} surface slowly loses its colour at a window.",
    ),
    Template(
        "dust",
        "Why is there dust on the {things} in the {place}?",
        "dust consists of fibres, soil and flakes of skin that settle from the air onto {things} and shelves.",
    ),
)

TEST = (
    Template(
        "mountain",
        "How high is {mountain}?",
        "{mountain} rises {height} metres above the sea and belongs to {range}.",
        _MOUNTAIN,
    ),
    Template("organ", "{a} asks about the {organ}. What is the use?", "in the human body the {organ} {does}.", _ORGAN),
    Template(
        "crop",
        "{b} sells {crop} in the {place}. Where does it come from?",
        "{crop} needs {climate} and comes from {lands}.",
        _CROP,
    ),
    Template("sky", "Can you explain this to {a}: {event}?", "{event} because {reason}.", _SKY),
    Template(
        "speed",
        "How fast is {wave} in {medium}?",
        "{wave} travels through {medium} at roughly {rate} per second.",
        _SPEED,
    ),
    Template(
        "burning",
        "Why does a glass over the flame put it out in the {place}?",
        "a flame needs oxygen from the air, and under the glass the oxygen is soon used up.",
    ),
    Template(
        "recycling",
        "What becomes of {others} and {things} in the rubbish?",
        "metal and paper are melted or pulped again, while much plastic is burnt or buried.",
    ),
    Template("gas", "Which gas is meant by {gas}?", "{gas} makes up {share} and is used {purpose}.", _GAS),
    Template(
        "language",
        "{a} moves to {nation} on {day}. What is spoken there?",
        "most inhabitants of {nation} speak {tongue}, and the land borders on {neighbour}.",
        _NATION,
    ),
    Template(
        "echo",
        "Why does one hear an echo in the empty {place}?",
        "hard bare walls throw sound waves back, whereas {things} and curtains would swallow part of them.",
    ),
)
