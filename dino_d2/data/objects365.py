"""Objects365 v2: its classes, and its splits under the names that configs use.

Below `DETECTRON2_DATASETS`, as Detectron2's own data sets are:

    objects365/annotations/zhiyuan_objv2_train.json, zhiyuan_objv2_val.json
    objects365/train/patch0/*.jpg, patch1/*.jpg, ...
    objects365/val/patch0/*.jpg, ...
"""

import os
from functools import partial
from pathlib import PurePosixPath

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import DatasetError
from ..layouts.adapt import ClassNames
from .coco import records_of
from .coco_json import parse
from .faults import image_faults

# In the order of their ids, from 1, as its annotations spell them.
_NAMES = """
Person, Sneakers, Chair, Other Shoes, Hat, Car, Lamp, Glasses, Bottle, Desk, Cup, Street Lights,
Cabinet/shelf, Handbag/Satchel, Bracelet, Plate, Picture/Frame, Helmet, Book, Gloves, Storage box,
Boat, Leather Shoes, Flower, Bench, Potted Plant, Bowl/Basin, Flag, Pillow, Boots, Vase,
Microphone, Necklace, Ring, SUV, Wine Glass, Belt, Moniter/TV, Backpack, Umbrella, Traffic Light,
Speaker, Watch, Tie, Trash bin Can, Slippers, Bicycle, Stool, Barrel/bucket, Van, Couch, Sandals,
Bakset, Drum, Pen/Pencil, Bus, Wild Bird, High Heels, Motorcycle, Guitar, Carpet, Cell Phone,
Bread, Camera, Canned, Truck, Traffic cone, Cymbal, Lifesaver, Towel, Stuffed Toy, Candle,
Sailboat, Laptop, Awning, Bed, Faucet, Tent, Horse, Mirror, Power outlet, Sink, Apple,
Air Conditioner, Knife, Hockey Stick, Paddle, Pickup Truck, Fork, Traffic Sign, Ballon, Tripod,
Dog, Spoon, Clock, Pot, Cow, Cake, Dinning Table, Sheep, Hanger, Blackboard/Whiteboard, Napkin,
Other Fish, Orange/Tangerine, Toiletry, Keyboard, Tomato, Lantern, Machinery Vehicle, Fan,
Green Vegetables, Banana, Baseball Glove, Airplane, Mouse, Train, Pumpkin, Soccer, Skiboard,
Luggage, Nightstand, Tea pot, Telephone, Trolley, Head Phone, Sports Car, Stop Sign, Dessert,
Scooter, Stroller, Crane, Remote, Refrigerator, Oven, Lemon, Duck, Baseball Bat,
Surveillance Camera, Cat, Jug, Broccoli, Piano, Pizza, Elephant, Skateboard, Surfboard, Gun,
Skating and Skiing shoes, Gas stove, Donut, Bow Tie, Carrot, Toilet, Kite, Strawberry, Other Balls,
Shovel, Pepper, Computer Box, Toilet Paper, Cleaning Products, Chopsticks, Microwave, Pigeon,
Baseball, Cutting/chopping Board, Coffee Table, Side Table, Scissors, Marker, Pie, Ladder,
Snowboard, Cookies, Radiator, Fire Hydrant, Basketball, Zebra, Grape, Giraffe, Potato, Sausage,
Tricycle, Violin, Egg, Fire Extinguisher, Candy, Fire Truck, Billards, Converter, Bathtub,
Wheelchair, Golf Club, Briefcase, Cucumber, Cigar/Cigarette, Paint Brush, Pear, Heavy Truck,
Hamburger, Extractor, Extention Cord, Tong, Tennis Racket, Folder, American Football, earphone,
Mask, Kettle, Tennis, Ship, Swing, Coffee Machine, Slide, Carriage, Onion, Green beans, Projector,
Frisbee, Washing Machine/Drying Machine, Chicken, Printer, Watermelon, Saxophone, Tissue,
Toothbrush, Ice cream, Hotair ballon, Cello, French Fries, Scale, Trophy, Cabbage, Hot dog,
Blender, Peach, Rice, Wallet/Purse, Volleyball, Deer, Goose, Tape, Tablet, Cosmetics, Trumpet,
Pineapple, Golf Ball, Ambulance, Parking meter, Mango, Key, Hurdle, Fishing Rod, Medal, Flute,
Brush, Penguin, Megaphone, Corn, Lettuce, Garlic, Swan, Helicopter, Green Onion, Sandwich, Nuts,
Speed Limit Sign, Induction Cooker, Broom, Trombone, Plum, Rickshaw, Goldfish, Kiwi fruit,
Router/modem, Poker Card, Toaster, Shrimp, Sushi, Cheese, Notepaper, Cherry, Pliers, CD, Pasta,
Hammer, Cue, Avocado, Hamimelon, Flask, Mushroon, Screwdriver, Soap, Recorder, Bear, Eggplant,
Board Eraser, Coconut, Tape Measur/ Ruler, Pig, Showerhead, Globe, Chips, Steak, Crosswalk Sign,
Stapler, Campel, Formula 1, Pomegranate, Dishwasher, Crab, Hoverboard, Meat ball, Rice Cooker,
Tuba, Calculator, Papaya, Antelope, Parrot, Seal, Buttefly, Dumbbell, Donkey, Lion, Urinal,
Dolphin, Electric Drill, Hair Dryer, Egg tart, Jellyfish, Treadmill, Lighter, Grapefruit,
Game board, Mop, Radish, Baozi, Target, French, Spring Rolls, Monkey, Rabbit, Pencil Case, Yak,
Red Cabbage, Binoculars, Asparagus, Barbell, Scallop, Noddles, Comb, Dumpling, Oyster,
Table Teniis paddle, Cosmetics Brush/Eyeliner Pencil, Chainsaw, Eraser, Lobster, Durian, Okra,
Lipstick, Cosmetics Mirror, Curling, Table Tennis
"""
OBJECTS365 = tuple(name.strip() for name in _NAMES.split(","))

# What COCO names differently; "Other Balls" is one of its eight kinds of balls.
COUNTERPARTS = {
    "bird": "Wild Bird",
    "handbag": "Handbag/Satchel",
    "suitcase": "Luggage",
    "skis": "Skiboard",
    "sports ball": "Other Balls",
    "bowl": "Bowl/Basin",
    "orange": "Orange/Tangerine",
    "dining table": "Dinning Table",
    "tv": "Moniter/TV",
    "teddy bear": "Stuffed Toy",
    "hair drier": "Hair Dryer",
}

# Named in the annotations of its training images, but not among the files that are published.
ABSENT = {
    "patch6/objects365_v1_00320532.jpg",
    "patch6/objects365_v1_00320534.jpg",
    "patch16/objects365_v2_00908726.jpg",
}


def counterparts(source: ClassNames, target: ClassNames) -> dict[int, str]:
    """Classes of the weights that the model has under COCO's name instead of Objects365's.

    Args:
        source, target: names of the classes of the weights and of the model

    Returns:
        the model's name by row of the weights, without classes of equal names
    """
    rows = {name.casefold(): row for row, name in enumerate(source) if name}
    taken = {name.casefold() for name in target if name}
    return {
        rows[other]: name
        for name, other in ((x, y.casefold()) for x, y in COUNTERPARTS.items())
        if name in target and name not in rows and other in rows and other not in taken
    }


def load(name: str, json_file: str, image_root: str) -> list[dict]:
    """Detectron2's records of a split; images are found in the folder of their patch.

    Raises:
        DatasetError: the annotations are missing or not of version 2, or images are missing
    """
    dataset = parse(json_file)
    found = {x["id"]: x["name"].strip().casefold() for x in dataset["categories"]}
    same = sum(found.get(i) == x.casefold() for i, x in enumerate(OBJECTS365, 1))
    if len(found) != len(OBJECTS365) or 2 * same < len(found):  # some copies mend the spelling
        raise DatasetError(
            f"'{json_file}' does not have the {len(OBJECTS365)} categories of Objects365 v2, "
            f"only {same} of them: take the annotations of version 2"
        )
    for image in dataset["images"]:  # images/v1/patch8/NAME, where archives have patch8/NAME
        image["file_name"] = "/".join(PurePosixPath(image["file_name"]).parts[-2:])
    images = [image for image in dataset["images"] if image["file_name"] not in ABSENT]
    if fault := next(image_faults(images, image_root), None):
        raise DatasetError(f"'{json_file}': {fault}")
    ids = MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id
    return records_of(name, dataset | {"images": images}, image_root, ids)


def register_splits() -> None:
    """Register `objects365_v2_train` and `objects365_v2_val`, unless another project has."""
    root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    for split in ("train", "val"):
        name = f"objects365_v2_{split}"
        if name in DatasetCatalog:  # of another project
            continue
        json_file = f"{root}/objects365/annotations/zhiyuan_objv2_{split}.json"
        image_root = f"{root}/objects365/{split}"
        DatasetCatalog.register(name, partial(load, name, json_file, image_root))
        MetadataCatalog.get(name).set(
            json_file=json_file,
            image_root=image_root,
            evaluator_type="coco",
            is_checked=True,
            thing_classes=list(OBJECTS365),
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(OBJECTS365))},
        )


register_splits()
