"""Beliefs, emotions and intentions of people."""

from __future__ import annotations

from micro.data.generators.scene import Template

TRAIN = (
    Template(
        "false_belief",
        "{a} put the {thing} in the {box} and left. {b} moved it to the {place}. Where will {a} look?",
        "{a} will look in the {box}, because {a_he} did not see {b} move it and still believes it is there.",
    ),
    Template(
        "true_belief",
        "{a} watched {b} carry the {thing} to the {place}. Where does {a} think it is?",
        "{a} knows that it is in the {place}, because {a_he} saw how {b} took it there.",
    ),
    Template(
        "proud",
        "{b} praised {a} for sharing {k} {things}. How does {a} feel?",
        "{a} feels proud, because {b} noticed how generous {a_he} had been with the {things}.",
    ),
    Template(
        "disappointed",
        "{b} promised to bring the {thing} on {day} but did not come. How is {a}?",
        "{a} is disappointed, since {a_he} had counted on {b} and waited for {b_him} on {day}.",
    ),
    Template(
        "apology",
        "{b} lost the {thing} that belonged to {a}. What does {b} want to do?",
        "{b} feels guilty and wants to apologise to {a}, whom the loss of the {thing} has hurt.",
    ),
    Template(
        "grateful",
        "{a} was tired, so {b} carried {k} {things} home for {a_him}. What does {a} feel?",
        "{a} is grateful that {b} understood how tired {a_he} was and offered to help.",
    ),
    Template(
        "jealous",
        "{b} got {k} new {things} and {a} got none. Why does {a} say nothing?",
        "{a} is jealous of {b}, but {a_he} is ashamed of it and tries not to show what {a_he} feels.",
    ),
    Template(
        "surprise",
        "{b} hid {k} {things} in the {place} for the birthday of {a}. Does {a} know?",
        "{a} suspects nothing, because {b} wants to surprise {a_him} and has kept it a secret.",
    ),
    Template(
        "white_lie",
        "{b} dislikes the {thing} from {a} but says that it is lovely. Why?",
        "{b} does not want to hurt {a}, so {b_he} pretends to be happy about the {thing}.",
    ),
    Template(
        "worried",
        "{b} has not come back from the {place}. Why does {a} keep looking at the door?",
        "{a} is worried about {b} and hopes with all {a_his} heart that nothing has happened to {b_him}.",
    ),
    Template(
        "trust",
        "{a} told only {b} where the {things} are hidden. What does that show?",
        "{a} trusts {b} and is sure that {b_he} would never tell anyone about the {things}.",
    ),
    Template(
        "irony",
        "{b} broke the {thing}, and {a} said: well done. What did {a} mean?",
        "{a} was annoyed and did not mean it as praise, and {b} understood that {a_he} was being ironic.",
    ),
    Template(
        "embarrassed",
        "{a} dropped {k} {things} in front of everyone in the {place}. Why did {a_he} blush?",
        "{a} was embarrassed, because {a_he} thought that all the others were laughing at {a_him}.",
    ),
    Template(
        "misunderstanding",
        "{b} took the wrong {thing} by mistake. What does {a} think?",
        "{a} believes that {b} did it on purpose, although {b_he} only meant to be kind.",
    ),
)

TEST = (
    Template(
        "second_order",
        "{a} hid the {thing} in the {place}, and {b} peeped through the door. What does {a} think that {b} believes?",
        "{a} thinks that {b} has no idea where it is, for {a_he} never noticed that {b_he} was watching.",
    ),
    Template(
        "relief",
        "{a} found the lost {thing} of {b} on {day}. How did {b} react?",
        "{b} was so relieved that {b_he} hugged {a} and forgot how upset {b_he} had been.",
    ),
    Template(
        "lonely",
        "{a} sat alone in the {place} with {k} {things}. Why did {b} join {a_him}?",
        "{b} sensed that {a} felt lonely and wished to cheer {a_him} up with some company.",
    ),
    Template(
        "persuade",
        "{a} wants {b} to lend {a_him} the {thing}. What does {a_he} try?",
        "{a} flatters {b}, because {a_he} expects that a friendly word will change {b_his} mind.",
    ),
    Template(
        "forgive",
        "{b} spoilt the {thing} of {a} and said sorry. Is {a} still angry?",
        "{a} was furious at first, but {a_he} forgave {b} when {a_he} saw how much {b_he} regretted it.",
    ),
    Template(
        "shy",
        "{a} would like to talk to {b} in the {place}. Why does {a_he} wait?",
        "{a} is shy and fears that {b} might find {a_him} boring, so {a_he} hesitates.",
    ),
    Template(
        "bluff",
        "{a} has nothing in the {box}, yet {a_he} smiles at {b}. What is the intention of {a}?",
        "{a} intends to fool {b}, who is supposed to feel certain that there is something valuable inside.",
    ),
    Template(
        "homesick",
        "{a} holds the {thing} from home and sighs. What is wrong?",
        "{a} misses the people at home, and the {thing} reminds {a_him} of how much {a_he} longs for them.",
    ),
    Template(
        "encourage",
        "{b} doubts that {b_he} can carry {k} {things} to the {elsewhere}. What does {a} say?",
        "{a} encourages {b} and assures {b_him} that nobody would mind if {b_he} failed.",
    ),
    Template(
        "regret",
        "{a} shouted at {b} about the {colour} {thing}. What does {a_he} think at night?",
        "{a} regrets the quarrel and imagines how unfairly treated {b} must have felt.",
    ),
)
