"""Word lists of the record generator: common nouns, places and column names. No person
is meant.
"""

from __future__ import annotations

WORDS: tuple[str, ...] = tuple(
    """
    amber anchor apple apron arch arrow ash aspen atlas autumn azure badge bakery balcony
    bamboo banner barley basil basket bay beacon bean bear berry birch bison blanket blue bolt
    border bottle boulder bowl box branch brass bread breeze brick bridge bronze brook brush
    bucket butter button cabin cable cactus camera canal candle canvas canyon carbon card
    cargo carpet carrot cart castle cedar cello chain chair chalk cherry chest cider circle
    citrus clay cliff clock cloud clover coal coast cobalt coconut coffee comet compass copper
    coral cork corn cotton cove crane crater cream creek crimson crystal cup curtain cypress
    daisy dawn deer delta desert desk diamond dolphin door dove drum dune dusk eagle east echo
    elm ember emerald engine fabric falcon farm feather fern field fig filter finch fir flag
    flame flint flute foam fog forest fork fossil fountain fox frame frost garden garlic gate
    ginger glacier glass globe glove gold grain granite grape grass gravel green grove guitar
    hail hammer harbor harvest hat hawk hazel hedge helmet heron hill hinge honey hook horizon
    horn house ice indigo ink iris iron island ivory ivy jade jar jasmine jet juniper kale
    kettle kite lake lamp lantern larch lark laurel lava lavender leaf leather ledger lemon
    lentil lever light lilac lily lime linen lion lock lotus lunar lynx magnet mango maple
    marble marsh meadow melon mesa metal mill mint mirror mist monsoon moon moss motor
    mountain mulberry nest nickel night north notebook nutmeg oak oat oasis ocean olive onion
    onyx opal orange orbit orchid otter owl oyster paddle palm panda paper park path peach
    peak pear pearl pebble pencil pepper petal piano pillow pine planet plate plum pocket pond
    poplar poppy port prairie prism pulley pumpkin quartz quill quilt rabbit radar radish rain
    raven red reef ribbon rice ridge ring river robin rocket roof root rope rose ruby rye
    saddle saffron sage sail salt sand sapphire scarf school sea seed shade shell shore silk
    silver sky slate snow solar south spark spice spring spruce square star steel stone storm
    stream street sugar summer summit sun swan table tea thistle thread thunder tide tiger
    timber tin topaz torch tower trail train tulip tunnel turquoise valley vanilla velvet
    violet walnut water wave west wheat wheel willow wind window winter wolf wood wool yarrow
    yellow zinc
    """.split()
)

PLACES: tuple[str, ...] = (
    *"""
    Accra Amsterdam Athens Auckland Bergen Berlin Bilbao Bogota Boston Bremen Brno Busan Cairo
    Calgary Cork Dakar Delhi Denver Dresden Dublin Durban Essen Geneva Genoa Ghent Graz Hanoi
    Helsinki Izmir Jakarta Kigali Kyiv Kyoto Lagos Leeds Leipzig Lille Lima Lisbon Ljubljana
    London Lyon Madrid Malmo Milan Montreal Mumbai Nairobi Nantes Oslo Ottawa Paris Perth
    Porto Prague Quito Riga Rome Seoul Sofia Split Sydney Taipei Tallinn Tokyo Toronto Turin
    Utrecht Valencia Vienna Vilnius Warsaw York Zagreb
    """.split(),
    "São Paulo",
    "Zürich",
    "Malmö",
    "Kraków",
    "New York",
    "Cape Town",
    "Buenos Aires",
    "Hong Kong",
    "San José",
    "Reykjavík",
    "Łódź",
)

GIVEN_NAMES: tuple[str, ...] = tuple(
    """
    Ada Alma Amir Ana Anton Ava Ben Bilal Bruno Carla Chen Clara Dana David Diego Dora Elena
    Eli Emma Erik Eva Farah Felix Finn Gita Grace Hana Hugo Ida Igor Ines Iris Ivan Jan Jana
    Jonas Julia Kai Karim Kim Lara Lena Leo Lina Luca Lucy Maria Max Mei Mia Milan Mina Nadia
    Nia Nina Noah Nora Olga Omar Oscar Otto Paula Pavel Petra Priya Rafael Rosa Ruth Sam Sara
    Selma Simon Sofia Tariq Tom Vera Viktor Wei Yara Yuki Zoe
    """.split()
)

STATUSES: tuple[str, ...] = tuple(
    """
    active archived blocked cancelled closed critical delayed delivered done draft error
    expired failed high idle inactive info late low medium missing new ok on off open optional
    paid paused pending queued ready rejected required resolved running sent shipped skipped
    started stopped unknown urgent valid waiting warning
    """.split()
)

LEVELS: tuple[str, ...] = (
    "DEBUG",
    "INFO",
    "WARN",
    "WARNING",
    "ERROR",
    "CRITICAL",
    "NOTICE",
    "TRACE",
)

VERBS: tuple[str, ...] = tuple(
    """
    accepted added built cached changed checked closed connected copied created deleted
    dropped failed fetched finished found ignored loaded lost missed moved opened parsed
    received refused reloaded removed renamed retried saved sent skipped started stopped
    synced timed updated uploaded waited wrote
    """.split()
)

COLUMNS: dict[str, tuple[str, ...]] = {
    "integer": tuple(
        """
        id age count quantity qty stock year rank score points pages seats floor port size
        width height depth attempts retries votes downloads views visits orders items
        units level priority minutes seconds hours days population capacity total number
        index wins losses goals lines errors status_code bytes offset
        """.split()
    ),
    "decimal": tuple(
        """
        price cost amount weight rate ratio temperature temp distance length speed
        latitude longitude lat lon balance discount tax margin rating average mean
        duration latency load voltage pressure humidity volume area
        """.split()
    ),
    "boolean": tuple(
        """
        active enabled in_stock available verified paid done public private visible
        required optional member open admin remote shipped archived deleted locked online
        valid debug verbose ready complete billable
        """.split()
    ),
    "word": tuple(
        """
        item product name label color colour material type category group tag team project
        topic animal plant fruit brand model kind unit shape theme channel queue table
        section module package branch target source
        """.split()
    ),
    "phrase": tuple(
        """
        title description note notes comment summary message subject task reason address
        book song event course details text remark caption question
        """.split()
    ),
    "person": tuple(
        """
        name owner author contact user manager player student driver assignee editor
        first_name
        """.split()
    ),
    "place": tuple(
        """
        city town location origin destination place region station office country port
        site
        """.split()
    ),
    "status": tuple(
        """
        status state priority level result severity stage phase condition outcome
        """.split()
    ),
    "date": tuple(
        """
        date day created updated due start end born joined expires released last_seen
        modified
        """.split()
    ),
    "time": tuple(
        """
        time start end departure arrival opens closes at starts ends
        """.split()
    ),
    "datetime": tuple(
        """
        timestamp created_at updated_at time logged_at seen when modified_at
        """.split()
    ),
    "code": tuple(
        """
        sku id code ref order_id ticket part serial key batch room gate flight plate zip
        postcode
        """.split()
    ),
    "version": tuple(
        """
        version release build tag since requires latest
        """.split()
    ),
    "address": tuple(
        """
        ip host address server email mail domain url website node
        """.split()
    ),
    "path": tuple(
        """
        path file folder directory filename route source target output image
        """.split()
    ),
    "hex": tuple(
        """
        hash commit digest color checksum token mac uid
        """.split()
    ),
    "money": tuple(
        """
        price cost fee budget salary total amount paid
        """.split()
    ),
}

ACCENTED: tuple[str, ...] = tuple(
    """
    café crème naïve façade jalapeño piñata über straße Grüße øre smørrebrød ångström żółty
    čaj šála niño señal garçon forêt été Ελλάδα λόγος мир книга река вода 東京 水 茶 山 日本
    北京 서울 나무 שלום 🙂 🚀 ✓ → € £ °C µm ½ № “so” …
    """.split()
)
