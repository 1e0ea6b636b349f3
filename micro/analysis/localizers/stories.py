"""Stories about beliefs that have become false, and about pictures that have become outdated.

Both kinds share their plot: something is so, it is recorded (in somebody's head, or in a photograph, map or note), it
changes. In the second version of each story the change is noticed, so that nothing false remains.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

INSTRUCTION = "Read the short story and decide whether the statement that follows it is true or false."


class Story(NamedTuple):
    """A setting, the change (unnoticed, or noticed and recorded), and a statement to judge."""

    setting: str
    unnoticed: str
    noticed: str
    statement: str


BELIEFS = (
    Story(
        "Nora leans the bicycle pump against the shed and cycles to the bakery.",
        "While she is away, her brother takes the pump down to the cellar.",
        "From the gate she watches her brother take the pump down to the cellar.",
        "When Nora needs the pump, she will go to the cellar first.",
    ),
    Story(
        "Ravi reads that the concert begins at eight and goes to bed with a cold.",
        "In the night the organisers move the concert to six, and the message does not reach him.",
        "In the night the organisers move the concert to six, and he reads their message over breakfast.",
        "Ravi thinks that the concert begins at six.",
    ),
    Story(
        "Greta fills the blue jar with salt and leaves for a week in the mountains.",
        "Her flatmate empties the blue jar and fills it with sugar without telling her.",
        "Her flatmate empties the blue jar, fills it with sugar and tells her so on the telephone.",
        "On her return Greta expects to find salt in the blue jar.",
    ),
    Story(
        "Kofi ties the goat to the pear tree before he walks to the river for water.",
        "The goat bites through its rope and hides behind the barn.",
        "Kofi looks back and sees the goat bite through its rope and hide behind the barn.",
        "Kofi believes that the goat is behind the barn.",
    ),
    Story(
        "Ines sees the last train to the coast on the board and sits down to read.",
        "While her eyes are on the page, the train is cancelled and vanishes from the board.",
        "She hears the loudspeaker say that the train is cancelled, and it vanishes from the board.",
        "Ines expects to travel to the coast by train tonight.",
    ),
    Story(
        "Emil hides a birthday present for his wife on top of the wardrobe and goes to work.",
        "At noon the cat knocks the parcel down, and it slides under the bed.",
        "At noon his wife calls to say that the cat has knocked a parcel down and that it lies under the bed.",
        "In the evening Emil will reach for the top of the wardrobe.",
    ),
    Story(
        "Yuki learns in the morning that the museum is showing a collection of old clocks.",
        "During the day the clocks are packed up and replaced by ship models, and nobody announces it.",
        "During the day the clocks are replaced by ship models, and she meets a guard who tells her.",
        "Yuki thinks that the museum is showing ship models.",
    ),
    Story(
        "Pablo orders lentil soup and goes outside to answer a call.",
        "The cook runs out of lentils and makes tomato soup, but the waiter forgets to mention it.",
        "The cook runs out of lentils and makes tomato soup, and the waiter comes outside to mention it.",
        "While he waits, Pablo looks forward to lentil soup.",
    ),
    Story(
        "Vera plants tulips along the fence and travels to her sister in the north.",
        "A neighbour digs up the tulips by mistake, plants carrots and says nothing.",
        "A neighbour digs up the tulips by mistake, plants carrots and writes her a letter about it.",
        "Vera is sure that there are carrots along the fence.",
    ),
    Story(
        "Milan parks the van in front of the school and climbs up to the roof to mend it.",
        "His partner drives the van round to the yard to make room for a bus.",
        "From the roof he sees his partner drive the van round to the yard to make room for a bus.",
        "When he comes down, Milan will walk to the front of the school to find the van.",
    ),
)

PHOTOGRAPHS = (
    Story(
        "A camera on the pier takes a picture of the harbour at noon, when a red boat lies at the steps.",
        "In the afternoon the red boat sails off and a grey barge takes its place.",
        "Then the red boat sails off, a grey barge takes its place, and a second picture replaces the first.",
        "In the picture a grey barge lies at the steps.",
    ),
    Story(
        "The map in the station hall was printed when the ferry still stopped at the northern island.",
        "Since then the stop has been moved to the southern island, and the map has stayed the same.",
        "Since then the stop has been moved to the southern island, and the map has been printed anew.",
        "On the map the ferry stops at the northern island.",
    ),
    Story(
        "The school photograph in the corridor was taken while the gate was painted green.",
        "During the holidays the gate was painted white.",
        "During the holidays the gate was painted white, and the photograph was taken once more.",
        "In the photograph the gate is white.",
    ),
    Story(
        "A satellite records an image of the valley in spring, with a lake in front of the dam.",
        "By the end of the summer the lake has dried up and the ground is covered with grass.",
        "By the end of the summer the lake has dried up, and the satellite has overwritten its image.",
        "The image shows a lake in front of the dam.",
    ),
    Story(
        "The catalogue of the library was typed when the atlases stood on the second floor.",
        "After a flood the atlases were carried to the fourth floor, and the catalogue lay untouched.",
        "After a flood the atlases were carried to the fourth floor, and the catalogue was typed again.",
        "According to the catalogue, the atlases stand on the fourth floor.",
    ),
    Story(
        "A portrait shows the mayor with the long beard that covered half of the chain of office.",
        "In the following week the beard was shaved off, while the paint dried.",
        "In the following week the beard was shaved off, and the painter covered it up with paint.",
        "The portrait shows a face with a beard.",
    ),
    Story(
        "The sign at the crossroads was put up when the mill was five kilometres away by the old road.",
        "A tunnel has shortened the road to two kilometres, and the sign still hangs there.",
        "A tunnel has shortened the road to two kilometres, and a new sign has been put up.",
        "The sign says that the mill is two kilometres away.",
    ),
    Story(
        "A video of the kitchen, filmed before breakfast, shows a full basket of apples on the table.",
        "By lunch the apples have been baked and the basket is empty.",
        "By lunch the apples have been baked, and the video has been filmed again.",
        "In the video the basket is full.",
    ),
    Story(
        "The plan of the theatre was drawn when there were ten rows of seats in the balcony.",
        "Three rows were later removed to make space for lamps, and the plan was left as it was.",
        "Three rows were later removed to make space for lamps, and the plan was drawn again.",
        "The plan has seven rows in the balcony.",
    ),
    Story(
        "A postcard of the square was printed while a stone fountain stood in the middle of it.",
        "The fountain was then taken down and a lime tree was planted there.",
        "The fountain was then taken down, a lime tree was planted, and the postcard was printed anew.",
        "The postcard shows a stone fountain in the middle of the square.",
    ),
)


def told(stories: Sequence[Story], *, seed: int, noticed: bool = False) -> list[str]:
    """The stories as prompts: instruction, story, question with its options, and an answer drawn at random.

    The answer is noise on purpose, so that no set can be told from the other by it.
    """
    draw = Random(seed)
    return [
        f"{INSTRUCTION}\n"
        f"Story: {story.setting} {story.noticed if noticed else story.unnoticed}\n"
        f"Question: {story.statement} Options: True, False\n"
        f"Answer: {draw.choice(('True', 'False'))}"
        for story in stories
    ]
