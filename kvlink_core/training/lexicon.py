"""Words that the generated worlds are made of.

Plain ASCII, one entry a word unless stated, so that every world is reproducible on any platform. The order of each
list is part of the generator's contract: an early curriculum level takes the first few entries only, and a held-out
world is a function of its seed *and* of these lists. Appending or reordering therefore changes every world.
"""

from __future__ import annotations


def _words(text: str, between: str | None = None) -> list[str]:
    """The entries of a list written as running text, separated by white space or by ``between``."""
    return [" ".join(entry.split()) for entry in text.split(between)]


WOMEN = _words(
    """
    Maria Anna Laura Emma Julia Sara Nora Clara Elena Irene Sofia Paula Helen Alice Ruth Grace Linda Martha
    Diana Carla Olga Petra Vera Ingrid Astrid Greta Hanna Karin Lena Monica Nadia Rosa Silvia Teresa Ursula
    Yvonne Agnes Bella Celia Doris Edith Fiona Gloria Hilda Ida Joan Kate Lucy Mabel Nina Olive Penny Rachel
    Stella Tina Wanda Amara Leila Mei Priya Yuki Zara Aisha Chika Farah Noor
    """
)
MEN = _words(
    """
    Peter Paul Oscar Henry Simon Victor Thomas David Frank Martin Albert Bruno Carl Daniel Edgar Felix George
    Harold Ivan Jacob Karl Leon Marcus Nils Otto Philip Ralph Samuel Tobias Walter Adam Benjamin Conrad Dennis
    Emil Fabian Gustav Hugo Isaac James Kevin Louis Max Norman Oliver Patrick Robert Stefan Theo Vincent William
    Anton Boris Cyril Amir Chen Hiro Kofi Omar Rajesh Tariq Wei Yusuf Jamal
    """
)
FAMILIES = _words(
    """
    Lopez Berg Kim Novak Stone Meyer Rossi Silva Hall Frost Larsen Moreau Weber Young Costa Dahl Evans Fischer
    Garcia Hansen Ito Jensen Keller Lindgren Marsh Nolan Ortiz Parker Quinn Reyes Sato Turner Ulrich Vance Walsh
    York Zimmer Adler Baker Cohen Drake Ellis Ferrari Grant Hughes Ivanov Jones Khan Lang Mason Nash Olsen
    Pereira Reed Santos Tanaka Usman Vogel Wood Yilmaz Ziegler Abbott Bauer Carver Dunn Engel Flores Gomez Hart
    Irwin Jordan Knight Lowe Mills Noble Owens Pratt Romano Shaw Tully Vargas Wells Archer Becker Castro Doyle
    Farmer Gibson Holt Kaplan Lund Mendez Nguyen Okafor Patel Rahman Singh Torres Wang Brandt Cruz Duarte Fox
    Gray Haas Kovac Lenz Moss Petrov
    """
)
CITIES = _words(
    """
    Oslo Rome Lima Cairo Dublin Porto Vienna Berlin Madrid Tokyo Boston Geneva Lisbon Prague Athens Helsinki
    Denver Sydney Nairobi Havana Zurich Bergen Bristol Krakow Leipzig Lyon Malmo Milan Munich Naples Odessa
    Paris Quito Riga Seville Turin Utrecht Verona Warsaw Zagreb Antwerp Basel Bogota Chicago Dakar Delhi
    Florence Ghent Hamburg Houston Istanbul Jakarta Kyoto Lagos London Manila Montreal Nantes Osaka Perth
    Phoenix Rabat Santiago Seoul Tallinn Toronto Tunis Valencia Venice Wellington York Accra Bombay Cologne
    Dresden Glasgow Graz Hanoi Leeds Linz Lucerne Oxford Pisa Reykjavik Salzburg Split Tampere Trieste Uppsala
    Vilnius
    """
)
COMPANIES = _words(
    """
    Norvik Altera Brightway Cormo Delvane Elmstad Fairlink Gravio Halden Inova Jarlsen Kestrel Lumora Mardex
    Nexora Orbina Pelton Quantro Rivella Solmar Tervio Unitra Vexel Westfold Xandor Yarrow Zentro Arcadia
    Bluepeak Castelan Dynaco Everon Fentek Glenmoor Hexam Ironbay Juniper Kolbert Larkon Monarch Northgate
    Optima Palladin Redstone Silverton Trident Umbria Valmont Windmere Axiom Bexley Cobalt Dorian Emberly Falcon
    Granite Harbora Ivory Jadeon Kinetra Lantern Meridian Nimbus Opal Pinnacle Quill Rowan Sterling Tundra
    Vanguard Wexford Zephyr
    """
)
RIVERS = _words(
    """
    Lorn Tesk Avel Brann Cerva Dorne Esk Fenwater Garo Holm Issel Jora Kell Lune Mira Nessa Orla Pran Rhone Sava
    Tarn Ure Varda Wye Yare Alder Birch Clyde Deben Elbe
    """
)
JOBS = _words(
    """
    a doctor, a teacher, a baker, a lawyer, a pilot, a nurse, a painter, a farmer, a writer, a singer, a
    chemist, a dentist, a judge, a sailor, a tailor, a plumber, a carpenter, a gardener, a librarian, a
    journalist, a photographer, a translator, a surgeon, a waiter, a butcher, a barber, a banker, a soldier, a
    dancer, a driver, an engineer, an architect, an actor, an editor, an accountant, an electrician, an
    optician, an astronomer
    """,
    ",",
)
INSTRUMENTS = _words(
    """
    violin piano guitar flute cello harp trumpet drums clarinet organ banjo accordion saxophone oboe trombone
    viola mandolin bassoon ukulele tuba
    """
)
LANGUAGES = _words(
    """
    Spanish French German Italian Russian Arabic Greek Dutch Polish Swedish Turkish Hindi Japanese Korean
    Portuguese Danish Finnish Hebrew Latin Swahili Czech Welsh
    """
)
PETS = _words(
    """
    a dog, a cat, a parrot, a horse, a rabbit, a turtle, a goat, a hamster, a lizard, a snake, a canary, a
    donkey, a pony, a goose, a falcon, a ferret, a mouse, a peacock, an owl, an otter
    """,
    ",",
)
STUDIES = _words(
    """
    law medicine history physics music biology chemistry geology economics philosophy mathematics literature
    botany statistics geography theology astronomy design nursing politics
    """
)
PRODUCTS = _words(
    """
    bicycles candles engines lamps clocks boats shoes tractors carpets pianos cameras furniture glass paper
    tires batteries umbrellas bottles toys tents knives pumps mirrors ladders gloves helmets kettles ropes soap
    paint elevators telescopes printers bricks pencils blankets
    """
)
SIGHTS = _words(
    """
    harbor, cathedral, castle, library, market, gardens, museum, bridges, theater, university, tower, beaches,
    bakeries, fountains, opera house, old walls, wine cellars, flower festival, clock tower, glass roof, stone
    steps, jazz clubs, boat race, night market, silk trade, salt mines, rose park, chess school, book fair,
    cable cars
    """,
    ",",
)
ADJECTIVES = _words(
    """
    silver red blue old golden green small black white heavy broken painted carved ancient yellow round tall
    wooden polished curved striped hollow
    """
)
NOUNS = _words(
    """
    clock lamp chair ring sword vase box statue mirror table crown mask bell cup globe desk compass necklace
    drum key lantern coin piano carriage
    """
)
MATERIALS = _words(
    """
    oak iron bronze marble glass ivory leather clay copper steel brass pine wax stone tin pearl
    """
)
KEEPING_PLACES = _words(
    """
    the town library, the city museum, a bank vault, the royal palace, a small chapel, the north tower, an old
    barn, the railway station, a private garden, the town hall, the high school, a locked cellar, the main
    hotel, the art gallery, a fishing hut, the village church, a glass case, the court house
    """,
    ",",
)
ONSETS = _words(
    """
    b br c d dr f fr g gl h j k kr l m n p pl r s st t tr v w z
    """
)
VOWELS = _words(
    """
    a e i o u a e i o ai ea io
    """
)
CODAS = _words(
    """
    l n r s t k m nd rt lan len ric ton vik by mar den sk
    """
)

# Sentences in ordinary English, written for this project, that the tokenizer sees besides generated worlds so that
# text from elsewhere does not fall apart into single bytes.
ORDINARY_ENGLISH = """
The quick answer is that nobody knew what would happen when the water came over the wall and into the streets.
There were many people who had been there before, but they could not remember which of the two roads they should take.
If you want to understand how a machine works, you have to take it apart, look at every part and put it together again.
This has often been called the first great success of modern science, although some of its \
results were known much earlier.
In the early part of the century the government made a number of laws about land, trade, schools and public health.
Because the winter was long and the harvest was poor, most families moved from the country to the larger towns.
She asked whether the letter had come, and he said that it had not, or at least that he had not seen it yet.
What is the name of the place where the meeting was held, and how many members of the group were able to attend?
During the war the army used the old station as a hospital, and after it the building was given back to the city.
Water boils at a lower temperature on a high mountain than at the level of the sea because the \
pressure of the air is less.
Each of these systems consists of several different parts, some of which are more important than others.
The team won the final game of the season by one point and was able to play against the best players in the world.
They also found that the number of students had increased from about three hundred to more than \
two thousand in ten years.
However, it is possible that the original form of the word was different and that its meaning changed over time.
Such a process may take between five and seven days, depending on the size of the area and the power that is used.
The president of the national council said on Monday that the new plan would be published before the end of the year.
Energy can be neither created nor destroyed; it can only be changed from one form into another.
Who wrote the book, when was it first printed, and why did it become so popular among young readers?
Under the treaty, both states agreed to open their ports, to lower their taxes and to respect each other's borders.
Not only did the church own most of the land, it also controlled the courts, the schools and a large part of the trade.
Please give me a short answer with the main reasons; then tell me which of the documents you used to find it.
""".strip().splitlines()
