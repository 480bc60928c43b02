"""The words of the embedded world: who lives in it, what can be said of them, and how it is said and asked.

Tables only. Every word is a pair (English, Chinese). An `Attribute` carries its wordings: `told` are statements, the
first being the canonical one that answers use; `asked` are questions that training may use; `reserved` are questions
that only the held-out family `facts` uses; `follow` are questions that lean on an earlier turn.
In a wording {n} stands for a name or pronoun, {p} for its possessive ("Anna's", "her") and {v} for the value.
"""
from __future__ import annotations

from dataclasses import dataclass

LANGS = ("en", "zh")
Word = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """One thing that can be known about a subject, with all its wordings by language."""

    name: str
    values: tuple[Word, ...]
    told: dict[str, tuple[str, ...]]
    asked: dict[str, tuple[str, ...]]
    reserved: dict[str, tuple[str, ...]]
    follow: dict[str, str]


# (English, Chinese, English pronoun)
PEOPLE = (
    ("Anna", "安娜", "she"), ("Tom", "汤姆", "he"), ("Emma", "艾玛", "she"), ("Peter", "彼得", "he"),
    ("Julia", "朱莉", "she"), ("David", "大卫", "he"), ("Lucy", "露西", "she"), ("Henry", "亨利", "he"),
    ("Maria", "玛丽", "she"), ("Jack", "杰克", "he"), ("Nina", "妮娜", "she"), ("Leo", "里奥", "he"),
    ("Rosa", "罗莎", "she"), ("Max", "麦克", "he"), ("Sofia", "索菲", "she"), ("Paul", "保罗", "he"),
    ("Alice", "爱丽", "she"), ("Simon", "西蒙", "he"), ("Vera", "薇拉", "she"), ("Victor", "维克", "he"),
    ("Helen", "海伦", "she"), ("Oscar", "奥卡", "he"), ("Grace", "格蕾", "she"), ("Felix", "菲利", "he"),
)
CITIES: tuple[Word, ...] = (
    ("Riva", "里瓦"), ("Dolma", "多玛"), ("Kesten", "凯登"), ("Varos", "瓦罗"),
    ("Tirel", "蒂雷"), ("Brena", "布伦"), ("Sundal", "松达"), ("Lomak", "洛克"),
)
COUNTRIES: tuple[Word, ...] = (("Norland", "诺兰"), ("Estria", "埃斯"), ("Marvia", "马维"), ("Zoland", "佐兰"))

HOME = Attribute(
    name="home", values=CITIES,
    told={"en": ("{n} lives in {v}.", "{p} home is in {v}.", "{n} has a house in {v}.",
                 "The city where {n} lives is {v}.", "{v} is {p} home city."),
          "zh": ("{n}住在{v}。", "{p}家在{v}。", "{n}在{v}有一个家。", "{n}住的城市是{v}。", "{v}是{p}家。")},
    asked={"en": ("Where does {n} live?", "Which city does {n} live in?", "Where is {p} home?",
                  "Tell me where {n} lives.", "What is {p} home city?", "Do you know where {n} lives?"),
           "zh": ("{n}住在哪里？", "{n}住在哪个城市？", "{p}家在哪里？", "告诉我{n}住在哪里。", "你知道{n}住在哪里吗？")},
    reserved={"en": ("I want to know where {n} lives.", "In which city is {p} home?"),
              "zh": ("我想知道{n}住在哪里。", "{p}家在哪个城市？")},
    follow={"en": "And where does {n} live?", "zh": "那么{n}住在哪里？"})

JOB = Attribute(
    name="job", values=(("doctor", "医生"), ("teacher", "老师"), ("farmer", "农民"), ("cook", "厨师"),
                        ("driver", "司机"), ("painter", "画家"), ("singer", "歌手"), ("writer", "作家")),
    told={"en": ("{n} is a {v}.", "{n} works as a {v}.", "{p} job is to be a {v}.", "{n} has the job of a {v}.",
                 "The work that {n} does is that of a {v}."),
          "zh": ("{n}是{v}。", "{p}工作是{v}。", "{n}是一名{v}。", "{p}职业是{v}。", "{n}做的工作是{v}。")},
    asked={"en": ("What is {p} job?", "What work does {n} do?", "Which job does {n} have?", "Tell me {p} job.",
                  "What does {n} work as?", "Do you know {p} job?"),
           "zh": ("{p}工作是什么？", "{n}做什么工作？", "{p}职业是什么？", "告诉我{p}工作。", "你知道{p}工作吗？")},
    reserved={"en": ("I want to know {p} job.", "What job does {n} work in?"),
              "zh": ("我想知道{p}工作。", "{n}的职业是做什么？")},
    follow={"en": "And what is {p} job?", "zh": "那么{p}工作是什么？"})

PET = Attribute(
    name="pet", values=(("cat", "猫"), ("dog", "狗"), ("bird", "鸟"), ("fish", "鱼"),
                        ("horse", "马"), ("rabbit", "兔子"), ("duck", "鸭子"), ("goat", "山羊")),
    told={"en": ("{n} has a {v}.", "{n} keeps a {v}.", "{p} pet is a {v}.", "{n} has a pet, and it is a {v}.",
                 "The animal that {n} keeps is a {v}."),
          "zh": ("{n}养{v}。", "{p}宠物是{v}。", "{n}养的动物是{v}。", "{n}有一个宠物，是{v}。")},
    asked={"en": ("What pet does {n} have?", "Which animal does {n} keep?", "What is {p} pet?", "Tell me {p} pet.",
                  "Which pet does {n} keep?", "Do you know {p} pet?"),
           "zh": ("{n}养什么？", "{p}宠物是什么？", "{n}养什么动物？", "告诉我{p}宠物。", "你知道{p}宠物吗？")},
    reserved={"en": ("I want to know {p} pet.", "What animal does {n} have?"),
              "zh": ("我想知道{p}宠物。", "{n}养的宠物是什么？")},
    follow={"en": "And what is {p} pet?", "zh": "那么{p}宠物是什么？"})

FOOD = Attribute(
    name="food", values=(("rice", "米饭"), ("bread", "面包"), ("soup", "汤"), ("cake", "蛋糕"),
                         ("noodles", "面条"), ("eggs", "鸡蛋"), ("cheese", "奶酪"), ("apples", "苹果")),
    told={"en": ("{n} likes {v}.", "{n} likes to eat {v}.", "{p} favourite food is {v}.", "{n} likes {v} best.",
                 "The food that {n} likes is {v}."),
          "zh": ("{n}喜欢{v}。", "{n}喜欢吃{v}。", "{n}最喜欢的食物是{v}。", "{n}爱吃{v}。")},
    asked={"en": ("What does {n} like to eat?", "What food does {n} like?", "What is {p} favourite food?",
                  "Tell me {p} favourite food.", "Which food does {n} like best?", "Do you know {p} favourite food?"),
           "zh": ("{n}喜欢吃什么？", "{n}最喜欢的食物是什么？", "{n}爱吃什么？", "告诉我{n}喜欢吃什么。",
                  "你知道{n}喜欢吃什么吗？")},
    reserved={"en": ("I want to know {p} favourite food.", "Which food does {n} like to eat?"),
              "zh": ("我想知道{n}喜欢吃什么。", "{n}爱吃什么食物？")},
    follow={"en": "And what is {p} favourite food?", "zh": "那么{n}喜欢吃什么？"})

COUNTRY = Attribute(
    name="country", values=COUNTRIES,
    told={"en": ("{n} is in {v}.", "{n} is a city in {v}.", "The city of {n} is in {v}.", "{p} country is {v}."),
          "zh": ("{n}在{v}。", "{n}是{v}的城市。", "{n}这个城市在{v}。", "{p}国家是{v}。")},
    asked={"en": ("Where is {n}?", "Which country is {n} in?", "What is {p} country?", "Tell me {p} country.",
                  "Do you know where {n} is?"),
           "zh": ("{n}在哪里？", "{n}在哪个国家？", "{p}国家是什么？", "告诉我{n}在哪里。", "你知道{n}在哪里吗？")},
    reserved={"en": ("I want to know where {n} is.", "In which country is {n}?"),
              "zh": ("我想知道{n}在哪里。", "{n}是哪个国家的城市？")},
    follow={"en": "And which country is it in?", "zh": "那么它在哪个国家？"})

GOODS = Attribute(
    name="goods", values=(("salt", "盐"), ("silk", "丝绸"), ("wine", "酒"), ("tea", "茶"),
                          ("glass", "玻璃"), ("paper", "纸"), ("honey", "蜂蜜"), ("coffee", "咖啡")),
    told={"en": ("{n} makes {v}.", "{n} is famous for {v}.", "The city of {n} makes {v}.",
                 "People make {v} in {n}."),
          "zh": ("{n}出产{v}。", "{n}以{v}出名。", "{n}这个城市出产{v}。", "{p}{v}很有名。")},
    asked={"en": ("What does {n} make?", "What is {n} famous for?", "Tell me what {n} makes.",
                  "What do people make in {n}?", "Do you know what {n} makes?"),
           "zh": ("{n}出产什么？", "{n}以什么出名？", "告诉我{n}出产什么。", "{n}这个城市出产什么？", "你知道{n}出产什么吗？")},
    reserved={"en": ("I want to know what {n} makes.", "What is the city of {n} famous for?"),
              "zh": ("我想知道{n}出产什么。", "{n}这个城市以什么出名？")},
    follow={"en": "And what does it make?", "zh": "那么它出产什么？"})

OF_PEOPLE = (HOME, JOB, PET, FOOD)
OF_CITIES = (COUNTRY, GOODS)

# The grammar of translation: The ADJ NOUN VERB the ADJ NOUN [WHEN].  <->  [WHEN]ADJ NOUN VERB ADJ NOUN。
ADJECTIVES: tuple[Word, ...] = (
    ("small", "小"), ("big", "大"), ("red", "红"), ("black", "黑"), ("white", "白"), ("green", "绿"),
    ("blue", "蓝"), ("fat", "胖"), ("thin", "瘦"), ("good", "好"), ("lazy", "懒"), ("slow", "慢"))
NOUNS: tuple[Word, ...] = PET.values + (
    ("cow", "牛"), ("tiger", "老虎"), ("fox", "狐狸"), ("pig", "猪"))
VERBS: tuple[Word, ...] = (
    ("sees", "看见"), ("hears", "听见"), ("helps", "帮助"), ("finds", "找到"),
    ("follows", "跟着"), ("fears", "害怕"), ("likes", "喜欢"), ("knows", "认识"))
TIMES: tuple[Word, ...] = (
    ("", ""), ("", ""), (" today", "今天"), (" at night", "晚上"), (" every day", "每天"), (" in the morning", "早上"))

# What can be counted in problems of several steps: (English plural, Chinese measure word and noun)
THINGS: tuple[Word, ...] = (("apples", "个苹果"), ("books", "本书"), ("eggs", "个鸡蛋"), ("coins", "枚硬币"))

ASK_TRANSLATION = {
    "en": ("Translate into Chinese: {s}", "Say this in Chinese: {s}", "What is this in Chinese? {s}"),
    "zh": ("翻译成英文：{s}", "用英文说：{s}", "这句话的英文是什么？{s}")}
ASK_SUM = {"en": ("What is {e}?", "{e}=?", "Compute {e}.", "How much is {e}?"),
           "zh": ("{e}等于多少？", "{e}=?", "请算{e}。", "{e}是多少？")}
ASK_PASSAGE = {"en": "Read this: {text}\n{question}", "zh": "阅读：{text}\n{question}"}
ASK_HOP = {"en": ("Which country does {n} live in?", "What is the country of {p} home?", "Tell me {p} country."),
           "zh": ("{n}住在哪个国家？", "{p}家在哪个国家？", "告诉我{n}住在哪个国家。")}
TELL_HOP = {"en": "{n} lives in {v}.", "zh": "{n}住在{v}。"}
UNKNOWN = {"en": "I do not know {n}.", "zh": "我不认识{n}。"}
WHAT_ABOUT = {"en": "What about {n}?", "zh": "{n}呢？"}
# What people say first to a chat model, and what this one says: (ways to say it, the answer). Not graded.
SMALL_TALK: dict[str, tuple[tuple[tuple[str, ...], str], ...]] = {
    "en": ((("Hello", "hello", "Hello!", "Hi", "hi", "Hi!", "hey", "Good morning", "Hi there!"),
            "Hello! Ask me about the people and cities I know."),
           (("How are you?", "how are you?", "How are you", "How do you do?"), "I am fine. Ask me something."),
           (("Who are you?", "who are you?", "who are you", "What are you?", "What is your name?"),
            "I am mindseed, a small model."),
           (("What can you do?", "what can you do?", "Help", "help", "What do you know?", "Can you help me?"),
            "I know some people and cities. I add, translate and read."),
           (("Thanks", "thanks", "Thank you", "Thank you!", "thank you"), "You are welcome."),
           (("Bye", "bye", "Goodbye", "Goodbye!", "See you!"), "Goodbye!")),
    "zh": ((("你好", "你好！", "您好", "早上好", "嗨", "大家好"), "你好！问问我认识的人和城市吧。"),
           (("你好吗？", "你好吗", "你怎么样？"), "我很好。问我吧。"),
           (("你是谁？", "你是谁", "你叫什么？", "你叫什么名字？", "介绍一下你自己"), "我是mindseed，一个小模型。"),
           (("你会什么？", "你能做什么？", "你会做什么？", "帮助", "你知道什么？"), "我认识一些人和城市，会加减、翻译和阅读。"),
           (("谢谢", "谢谢！", "谢谢你", "多谢"), "不客气。"),
           (("再见", "再见！", "拜拜"), "再见！"))}

# Invented names, of people or places: two parts, each of which training knows, in a pair that is new. Copying one
# takes more than one token, in the right order.
FIRST_NAMES = ("Bel", "Cor", "Dan", "Fen", "Gar", "Hal", "Jon", "Kim", "Lor", "Ned", "Pim", "Ras", "Sel", "Tor",
               "Vin", "Wes")
LAST_NAMES = ("Ash", "Bay", "Dun", "Elm", "Gil", "Hay", "Ivy", "Kay", "Lee", "Moe", "Nye", "Orr", "Poe", "Ray", "Sol",
              "Tay", "Ulm", "Way", "Yew", "Zed")
CHARACTERS = "巴科拉迪尼塔鲁萨基莫佩古贝法甘哈朗托雅泽"


@dataclass(frozen=True, kw_only=True)
class ToolWords:
    """A tool of the world: its one argument, how it is asked for and how its result is told."""

    name: str
    description: str
    argument: str
    result: str                                   # key of the result
    asked: dict[str, tuple[str, ...]]
    told: dict[str, str]


TOOLS = (
    ToolWords(name="get_weather", description="weather of a city", argument="city", result="weather",
              asked={"en": ("What is the weather in {x}?", "How is the weather in {x}?", "Tell me the weather in {x}."),
                     "zh": ("{x}的天气是什么？", "{x}的天气好吗？", "告诉我{x}的天气。")},
              told={"en": "It is {r} in {x}.", "zh": "{x}是{r}。"}),
    ToolWords(name="get_time", description="time in a city", argument="city", result="time",
              asked={"en": ("What time is it in {x}?", "Tell me the time in {x}.", "What is the time in {x}?"),
                     "zh": ("{x}现在几点？", "告诉我{x}的时间。", "{x}的时间是多少？")},
              told={"en": "It is {r} in {x}.", "zh": "{x}现在是{r}。"}),
    ToolWords(name="find_phone", description="phone number of a person", argument="person", result="phone",
              asked={"en": ("What is the phone number of {x}?", "Find the phone number of {x}.",
                            "Tell me the phone number of {x}."),
                     "zh": ("{x}的电话是多少？", "找到{x}的电话。", "告诉我{x}的电话。")},
              told={"en": "The phone number of {x} is {r}.", "zh": "{x}的电话是{r}。"}),
    ToolWords(name="calculate", description="value of a sum", argument="sum", result="value",
              asked=ASK_SUM, told={"en": "{x}={r}", "zh": "{x}={r}"}),
)
WEATHER: tuple[Word, ...] = (("sunny", "晴天"), ("cloudy", "阴天"), ("rainy", "雨天"), ("cold", "冷天"))
