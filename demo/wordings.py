"""How questions about the drawn world are worded in English and Chinese; `demo/asking.py` fills them in.

A wording has the slots `{}` (what is asked about, twice in a comparison), `{s}` (the same in the plural), `{more}`
(larger or smaller), `{image}` (a word for the picture) and, if the world has no answer, `{thing}`, `{country}`,
`{food}` and `{number}`. The wordings that only the evaluation uses are in `demo/paraphrases.py`.
"""

# forms of the questions of each type; a form that stands twice is asked twice as often
FORMS = {
    "colour": ("colour",),
    "shape": ("shape",),
    "count": ("count",),
    "position": ("position", "position", "position", "at"),
    "existence": ("existence",),
    "size": ("compare", "compare", "compare", "which", "size"),
    "description": ("description",),
    "unknown": ("unknown",),
}
LANGUAGES = ("english", "chinese")
SUFFIX = {"english": "", "chinese": "_zh"}  # of the type's name, so that the scores of the languages stand apart
# the one answer to everything that the drawn world does not contain
UNKNOWN = {"english": "I only know my drawn world of coloured shapes.", "chinese": "我只认识这个画出来的图形世界。"}

ENGLISH = {
    "colour": (
        *("What colour is the {}?", "What color is the {}?", "Which colour does the {} have?"),
        *("The {} is what colour?", "Which color is the {}?", "What is the colour of the {}?"),
        *("Tell me the color of the {}.", "{}: which colour?", "The {}: what colour is it?"),
        *("In what colour is the {} drawn?", "Name the color of the {}.", "{} colour?"),
        *("What colour does the {} have?", "I want to know the colour of the {}.", "Find the {}. What colour is it?"),
        *("Do you know what color the {} is?", "What colour was used for the {}?", "Give me the colour of the {}."),
        *("The colour of the {}, which is it?", "{}: colour?", "And the color of the {}?"),
        *("What about the colour of the {}?", "Which of the colours is the {}?", "Say the colour of the {}."),
    ),
    "shape": (
        *("What shape is the {}?", "Which shape does the {} have?", "What is the shape of the {}?", "{} shape?"),
        *("Tell me the shape of the {}.", "The {}: what shape is it?", "The {} is what shape?", "{}: which shape?"),
        *("Name the shape of the {}.", "What kind of shape is the {}?", "What form does the {} have?"),
        *("Do you know what shape the {} has?", "Which shape is the {}?", "I want to know the shape of the {}."),
        *("What is the form of the {}?", "Give me the shape of the {}.", "Find the {}. What shape is it?"),
        *("The shape of the {}, which is it?", "{}: shape?", "And the shape of the {}?"),
        *("What about the shape of the {}?", "Say which shape the {} has.", "What kind of figure is the {}?"),
        *("Which of the shapes is the {}?",),
    ),
    "count": (
        *("How many {s} are there?", "How many {s} can you see?", "How many {s} are in the {image}?"),
        *("{s}: how many?", "How many {s} do you see?", "What is the number of {s}?", "Count the {s}."),
        *("Tell me how many {s} there are.", "Can you count the {s}?", "How many {s} does the {image} show?"),
        *("The {s}: how many are there?", "Give me the number of {s}.", "There are how many {s}?"),
        *("How many {s} have been drawn?", "How many {s}?", "Do you know how many {s} there are?"),
        *("What number of {s} can you see?", "I want to know how many {s} exist.", "Say the number of {s}."),
        *("Of {s}, how many are there?", "How many of them are {s}?", "Count {s} for me."),
        *("Altogether, how many {s} are there?", "I need the count of {s}.", "How many {s} does it have?"),
        *("How many {s} were drawn?", "What is the count of {s}?", "The number of {s}, please.", "{s}: number?"),
        *("And the {s}, how many?", "The count of {s}?", "What number of {s} have they drawn?"),
        *("How many {s} can be found?", "Find all {s} and count them."),
    ),
    "position": (
        *("Where is the {}?", "In which part of the {image} is the {}?", "Where can I find the {}?", "{}: where?"),
        *("What is the position of the {}?", "Tell me where the {} is.", "In which place is the {}?", "Find the {}."),
        *("Where do you see the {}?", "Which part of the {image} has the {}?", "The {}: where is it?"),
        *("The {} is where?", "Where was the {} drawn?", "On which side is the {}?", "Give me the place of the {}."),
        *("Do you know where the {} is?", "I want to know where the {} is.", "What place does the {} have?"),
        *("Please locate the {}.", "At which place is the {}?", "Where exactly is the {}?", "In what part is the {}?"),
        *("Where does the {} sit?", "Do you see where the {} is?", "Let me know where the {} is."),
        *("The place of the {}?", "{}: position?", "And the position of the {}?"),
        *("In which corner or side is the {}?", "Say where the {} is.", "I look for the {}. Where is it?"),
        *("Point me to the {}.",),
    ),
    "at": (
        *("What is in the {}?", "What do you see in the {}?", "Which object is in the {}?"),
        *("In the {}: what is there?", "What can you see in the {}?", "What is there in the {}?"),
        *("Tell me what is in the {}.", "What object is in the {}?", "What has been drawn in the {}?"),
        *("The {}: what is there?", "Name the object in the {}.", "And in the {}, what is there?", "{}: what is it?"),
        *("Say what is in the {}.", "What thing is in the {}?", "What could be in the {}?"),
        *("Look at the {}. What do you see?", "What is drawn in the {}?"),
    ),
    "existence": (
        *("Is there a {}?", "Can you see a {}?", "Is there a {} in the {image}?", "Do you see a {}?"),
        *("A {}: is there one?", "Does the {image} have a {}?", "Is a {} there?", "Does the {image} show a {}?"),
        *("Has a {} been drawn?", "Can a {} be seen?", "Is there any {}?", "Are there any {s}?"),
        *("Can you see any {s}?", "Can you find a {}?", "Tell me if there is a {}."),
        *("Do you know whether there is a {}?", "I want to know if you see a {}.", "Are there {s}?"),
        *("Is any {} present?", "Is one of the objects a {}?", "Could you find a {}?", "Does it have a {}?"),
        *("Look for a {}. Is it there?", "Yes or no: is there a {}?", "Have you seen a {}?"),
        *("I look for a {}: can you see it?", "Do we have a {} here?"),
    ),
    "compare": (
        *("Is the {} {more} than the {}?", "Compared with the {1}, is the {0} {more}?"),
        *("The {} is {more} than the {}?", "Do you think the {} is {more} than the {}?"),
        *("Does the {} look {more} than the {}?", "Tell me if the {} is {more} than the {}."),
        *("Has the {} been drawn {more} than the {}?", "The {} and the {}: is the first one {more}?"),
        *("Can you see whether the {} is {more} than the {}?", "Of the two, is the {} {more} than the {}?"),
        *("Is it right that the {} is {more} than the {}?", "Check whether the {} is {more} than the {}."),
        *("Yes or no: is the {} {more} than the {}?", "Is the {} in fact {more} than the {}?"),
        *("Beside the {1}, does the {0} look {more}?", "And is the {} {more} than the {}?"),
        *("Say whether the {} is {more} than the {}.", "The {}: is it {more} than the {}?"),
        *("Am I right that the {} is {more} than the {}?", "I think the {} is {more} than the {}. Is it?"),
        *("Seen beside the {1}, is the {0} {more}?", "If you compare them, is the {} {more} than the {}?"),
        *("Do you know if the {} is {more} than the {}?", "Compare the {0} with the {1}: is the {0} {more}?"),
        *("Would it be right to say that the {} is {more} than the {}?",),
        *("Is the size of the {} {more} than that of the {}?", "Could the {} be {more} than the {}?"),
        *("I want to know whether the {} is {more} than the {}.", "{} {more} than {}?"),
        *("Was the {} drawn {more} than the {}?", "Look: is the {} {more} than the {}?"),
    ),
    "which": (
        *("Which is {more}, the {} or the {}?", "Which one is {more}: the {} or the {}?"),
        *("The {} or the {}: which is {more}?", "What is {more}, the {} or the {}?"),
        *("Which of the two is {more}, the {} or the {}?", "Tell me which is {more}, the {} or the {}."),
        *("Of the {} and the {}, which one is {more}?", "Say which is {more}: the {} or the {}."),
        *("Is the {} or the {} {more}?", "Which looks {more}, the {} or the {}?"),
        *("I want to know which is {more}, the {} or the {}.", "{more}: the {} or the {}?"),
        *("Do you know which one is {more}, the {} or the {}?", "Compare the {} and the {}. Which is {more}?"),
        *("Which has been drawn {more}, the {} or the {}?", "Here are the {} and the {}. Which is the {more} one?"),
        *("Looking at the {} and the {}, which one is {more}?", "What do you think is {more}, the {} or the {}?"),
        *("Choose the {more} one: the {} or the {}.", "The {more} one, is it the {} or the {}?"),
        *("Among the {} and the {}, what is {more}?",),
    ),
    "size": (
        *("What size is the {}?", "How large is the {}?", "How big is the {}?", "Is the {} large or small?"),
        *("Is the {} small or large?", "Is the {} big or small?", "What is the size of the {}?"),
        *("The {}: what size is it?", "Tell me the size of the {}.", "Tell me whether the {} is large or small."),
        *("Which size does the {} have?", "Is the {} a large one or a small one?"),
        *("Say whether the {} is large or small.", "How large does the {} look?", "Is it large or small, the {}?"),
        *("The size of the {}, which is it?", "{}: size?", "And the size of the {}?"),
        *("What about the size of the {}?", "{}: large or small?", "{}, big or little?"),
        *("Is the {} of large or of small size?", "Do you see the {} as large or small?"),
        *("Large or small: what is the {}?", "Do you know how big the {} is?", "I want to know the size of the {}."),
        *("Give me the size of the {}.", "Find the {}. Is it large or small?", "Name the size of the {}.", "{} size?"),
        *("Do you think the {} is large or small?", "Which of the two sizes is the {}?"),
        *("Has the {} been drawn large or small?",),
    ),
    "description": (
        *("Describe the {image}.", "What is in the {image}?", "Describe the following {image}."),
        *("What is shown here?", "What does the {image} show?", "What can you see?"),
        *("Tell me what is in the {image}.", "What do you see?", "Tell me about the {image}."),
        *("What do you see in this {image}?", "List all objects.", "Name all objects."),
        *("List the objects in the {image}.", "Give a description of the {image}.", "Write down everything you see."),
        *("Can you describe the {image}?", "What is this a {image} of?", "Say what you see.", "What has been drawn?"),
        *("Which objects are in the {image}?", "What can be seen in the {image}?", "What objects can you see?"),
        *("Explain what you see.", "What is there?", "Say everything that is in the {image}.", "What is all this?"),
        *("Show me all objects as a list.", "Please say what is drawn.", "What things are there?"),
        *("Sum up the {image}.", "Read the {image} to me.", "Explain this {image} to me.", "What was drawn here?"),
        *("Which things have been drawn?", "Write a list of all things.", "A description, please."),
    ),
    "unknown": (
        *("Who are you?", "What is your name?", "How old are you?", "Where are you from?", "What can you do?"),
        *("What is the weather like today?", "What is the weather?", "Is it going to rain?", "What time is it?"),
        *("What day is it today?", "What is the capital of {country}?", "Who is the president of {country}?"),
        *("How many people live in {country}?", "Where is {country}?", "What language do they speak in {country}?"),
        *("Is {country} bigger than {country}?", "What is {number} plus {number}?"),
        *("What is {number} times {number}?", "Tell me a joke.", "Tell me a story.", "Sing a song."),
        *("Write a poem about a {thing}.", "Play some music.", "How do I cook {food}?"),
        *("What does {food} taste like?", "Do you like {food}?", "Who wrote this book?"),
        *("What is the meaning of life?", "Can you help me with my homework?", "What is the man doing?", "Why?"),
        *("What is the woman wearing?", "What colour is the {thing}?", "What color is your {thing}?"),
        *("Where is the {thing}?", "Is the {thing} happy?", "How heavy is a {thing}?", "What does a {thing} eat?"),
        *("What shape is a {thing}?", "Why is the sky blue?", "Who painted this?", "When was this {image} taken?"),
        *("Who won the game?", "What is love?", "Can you swim?", "Are you a robot?", "Are you human?"),
        *("Who made you?", "How do you feel?", "Do you have a {thing}?", "Translate this into French."),
        *("How much is a {thing}?", "Where can I buy a {thing}?", "How far is the moon?", "Hello!", "Good morning."),
        *("Thank you.", "What are you thinking about?", "When does the train leave?"),
        *("How do I learn {country}'s language?", "Is {food} healthy?", "What happened in {country}?", "I am tired."),
        *("What is the best film?", "Who is your friend?", "Where do you live?", "Which {thing} is yours?"),
        *("Do you sleep?", "Can you drive?", "What is {number} divided by {number}?", "What did you do yesterday?"),
        *("Do you have a brother?", "What is the highest tower in {country}?", "Which river is the longest?"),
        *("Who is the woman beside the {thing}?",),
    ),
}
CHINESE = {
    "colour": (
        *("{}是什么颜色？", "{}是什么颜色的？", "{}的颜色是什么？", "{}是哪种颜色？", "告诉我{}的颜色。"),
        *("{}用的是什么颜色？", "你知道{}是什么颜色吗？", "说出{}的颜色。", "{}呈什么颜色？"),
        *("我想知道{}是什么颜色。", "能告诉我{}的颜色吗？", "{}有什么颜色？", "{}，什么颜色？", "{}画成了什么颜色？"),
        *("看看{}，它是什么颜色？", "什么是{}的颜色？", "{}，颜色？", "说一下{}的颜色好吗？", "{}会是什么颜色？"),
        *("请看{}，什么颜色的？",),
    ),
    "shape": (
        *("{}是什么形状？", "{}是什么形状的？", "{}的形状是什么？", "{}是哪种形状？", "告诉我{}的形状。"),
        *("{}呈什么形状？", "你知道{}是什么形状吗？", "说出{}的形状。", "我想知道{}是什么形状。"),
        *("能告诉我{}的形状吗？", "{}，什么形状？", "{}有什么形状？", "{}画成了什么形状？", "看看{}，它是什么形状？"),
        *("{}属于什么形状？", "{}，形状？", "说一下{}的形状好吗？", "{}会是什么形状？", "什么是{}的形状？"),
    ),
    "count": (
        *("有几个{s}？", "有多少个{s}？", "{image}中有几个{s}？", "一共有多少{s}？", "{s}有几个？", "{s}有多少个？"),
        *("你能看到几个{s}？", "数一数{s}。", "{s}的数量是多少？", "{image}里有几个{s}？", "告诉我有几个{s}。"),
        *("{s}总共有几个？", "能数一下{s}有几个吗？", "你看到多少个{s}？", "我想知道有多少{s}。", "画了几个{s}？"),
        *("{s}，多少个？", "{s}的个数是几？", "请数一下{s}。", "能找到几个{s}？", "出现了几个{s}？"),
    ),
    "position": (
        *("{}在哪里？", "{}在哪儿？", "{}在什么位置？", "{}的位置是哪里？", "{}位于{image}中的哪个位置？"),
        *("找一下{}。", "{}在{image}的哪个部分？", "哪里有{}？", "告诉我{}在哪里。", "{}在{image}的什么地方？"),
        *("你在哪里看到{}？", "{}位于哪里？", "{}画在哪里？", "{}处于什么方位？", "我想知道{}在哪里。"),
        *("你知道{}在哪里吗？", "哪个位置是{}？", "{}的方位是哪里？", "{}在哪个地方？", "{}在哪一块？"),
        *("能找到{}在哪里吗？", "说出{}的位置。", "{}，在哪里？", "我找不到{}，在哪儿？", "请说一下{}的位置。"),
        *("{}放在哪里？", "{}在图的哪一侧？"),
    ),
    "at": (
        *("{}有什么？", "{}是什么？", "{}画着什么？", "在{}能看到什么？", "{}有什么东西？", "{}有什么物体？"),
        *("告诉我{}有什么。", "{image}的{}是什么？", "你在{}看到了什么？", "{}是什么东西？", "位于{}的是什么？"),
        *("看看{}，有什么？", "{}会是什么？", "说说{}有什么。", "{}那里是什么？", "{}画的是什么？"),
    ),
    "existence": (
        *("有{}吗？", "有没有{}？", "{image}中有{}吗？", "是否有{}？", "{image}里有没有{}？", "存在{}吗？"),
        *("有{}没有？", "这里有{}吗？", "里面有没有{}？", "告诉我有没有{}。", "{}有吗？", "你知道有没有{}吗？"),
        *("我想知道有没有{}。", "看得到{}吗？", "能找到{}吗？", "{image}里出现了{}吗？", "里面是不是有{}？"),
        *("{}出现了吗？", "你看见{}了吗？", "请检查有没有{}。", "{image}里存在{}吗？", "这里能不能看到{}？"),
        *("找找有没有{}。", "有{}，对吗？", "{image}上能看到{}吗？", "到这里找{}，有没有？"),
    ),
    "compare": (
        *("{}比{}{more}吗？", "{}是不是比{}{more}？", "{}是否比{}{more}？", "和{1}相比，{0}更{more}吗？"),
        *("{}比{}更{more}吗？", "{}要比{}{more}吗？", "你觉得{}比{}{more}吗？", "跟{1}比，{0}是不是更{more}？"),
        *("告诉我{}是否比{}{more}。", "拿{}和{}比，前者更{more}吗？", "{}有没有比{}{more}？"),
        *("说说{}是否比{}{more}。", "{}看上去比{}{more}吗？", "{}真的比{}{more}吗？", "判断一下：{}比{}{more}吗？"),
        *("请问{}比{}{more}吗？", "{}，比{}更{more}吗？", "{}比起{}来，更{more}吗？", "我想知道{}是不是比{}{more}。"),
        *("比一比：{}比{}{more}吗？", "{}会不会比{}{more}？", "{0}同{1}比较，{0}{more}吗？", "{}比{}要{more}，对吗？"),
        *("{}比{}{more}一点吗？", "你认为{}是不是比{}更{more}？", "看一看，{}比{}{more}没有？"),
    ),
    "which": (
        *("{}和{}哪个{more}？", "{}和{}，哪个更{more}？", "哪个更{more}，{}还是{}？", "{}和{}谁更{more}？"),
        *("{}与{}相比，哪个更{more}？", "哪一个{more}：{}还是{}？", "告诉我{}和{}哪个{more}。"),
        *("{}、{}，哪个{more}？", "说说{}和{}哪个更{more}。", "{}还是{}更{more}？", "在{}和{}之间，哪个更{more}？"),
        *("{}和{}当中{more}的是哪个？", "请问{}和{}哪个{more}？", "比一比{}和{}，哪个{more}？"),
        *("{}同{}比，谁更{more}？", "{more}的是{}还是{}？", "你觉得{}和{}哪个更{more}？"),
        *("{}和{}里面，哪一个更{more}？", "我想知道{}和{}谁{more}。", "{}或者{}，哪个{more}？"),
    ),
    "size": (
        *("{}是大的还是小的？", "{}有多大？", "{}是小的还是大的？", "{}的大小是什么？", "{}是大还是小？"),
        *("{}是什么大小？", "{}的尺寸是多少？", "告诉我{}是大是小。", "我想知道{}有多大。", "{}看上去是大还是小？"),
        *("说说{}的大小。", "{}属于大的还是小的？", "{}，大还是小？", "请问{}是大是小？", "{}的大小呢？"),
        *("你觉得{}是大的还是小的？", "{}画得大还是小？", "说一下{}是大还是小。", "{}有多大多小？", "{}是哪种大小？"),
        *("能告诉我{}的大小吗？", "看看{}，它是大的还是小的？"),
    ),
    "description": (
        *("描述一下{image}。", "请描述{image}。", "{image}里有什么？", "{image}中有什么？", "你看到了什么？"),
        *("{image}画了什么？", "说说{image}里有什么。", "{image}上都有什么？", "请介绍{image}。"),
        *("告诉我{image}中有哪些物体。", "列出所有物体。", "{image}里都有哪些东西？", "请用一句话描述{image}。"),
        *("能描述一下{image}吗？", "你能看到什么？", "这里画着什么？", "讲一讲{image}。", "把{image}的内容说一说。"),
        *("这里面画着哪些东西？", "说出你看见的一切。", "{image}是什么样子的？", "解释一下{image}。"),
        *("这里有些什么？", "概括一下{image}。", "都看到哪些物体？", "说一说看到的东西。", "请讲讲这里的内容。"),
        *("看图说话。", "图上画的东西有哪些？", "{image}里的物体，都说一下。"),
    ),
    "unknown": (
        *("你是谁？", "你叫什么名字？", "你几岁了？", "你从哪里来？", "你能做什么？", "今天天气怎么样？"),
        *("天气怎么样？", "现在几点了？", "今天星期几？", "{country}的首都是哪里？", "{country}有多少人？"),
        *("谁是{country}的总统？", "{country}在哪里？", "{country}比{country}大吗？", "{number}加{number}等于几？"),
        *("{number}乘{number}是多少？", "讲个笑话。", "给我讲个故事。", "唱首歌吧。", "写一首关于{thing}的诗。"),
        *("{food}怎么做？", "{food}好吃吗？", "你喜欢{food}吗？", "那个男人在做什么？", "她穿着什么衣服？"),
        *("{thing}是什么颜色？", "{thing}在哪里？", "为什么？", "你的{thing}是什么颜色？", "{thing}吃什么？"),
        *("{thing}有多重？", "人生的意义是什么？", "天空为什么是蓝的？", "谁画的？", "照片是什么时候拍的？"),
        *("你会游泳吗？", "你是机器人吗？", "你是人吗？", "谁创造了你？", "放点音乐。", "把这句话翻译成英文。"),
        *("{thing}多少钱？", "哪里能买到{thing}？", "月亮离我们有多远？", "你感觉怎么样？", "你好！", "早上好。"),
        *("谢谢。", "为什么会下雨？", "帮我写作业。", "谁赢了比赛？", "附近有什么好吃的？", "我累了。"),
        *("怎么学英语？", "你爱我吗？", "明天会下雨吗？", "有什么新闻？", "推荐一部电影。", "你有{thing}吗？"),
        *("你住在哪里？", "谁写了这本书？", "火车什么时候开？", "{country}人说什么语言？", "{thing}高兴吗？"),
        *("你在想什么？", "你睡觉吗？", "{number}除以{number}等于几？", "你昨天做了什么？", "世界上最长的河是哪条？"),
        *("{country}最高的楼是哪座？", "你会开飞机吗？"),
    ),
}
WORDINGS = {"english": ENGLISH, "chinese": CHINESE}

MORE = {
    "english": {"large": ("larger", "bigger"), "small": ("smaller",)},
    "chinese": {"large": ("大",), "small": ("小",)},
}
IMAGE_WORDS = {"english": ("picture", "image", "photo"), "chinese": ("图", "图片", "画面", "这张图", "这幅画")}
# synonyms, only in questions; an answer is always the world's own name (`demo/world.py`)
ENGLISH_PLACES = {
    **{"northwest": ("northwest", "top left", "upper left corner"), "north": ("north", "top middle", "top center")},
    **{"northeast": ("northeast", "top right", "upper right corner"), "west": ("west", "middle left", "left middle")},
    **{"center": ("center", "middle", "centre"), "east": ("east", "middle right", "right middle")},
    **{
        "southwest": ("southwest", "bottom left", "lower left corner"),
        "south": ("south", "bottom middle", "bottom center"),
    },
    **{"southeast": ("southeast", "bottom right", "lower right corner")},
}
CHINESE_PLACES = {
    **{"northwest": ("左上", "左上角"), "north": ("上方", "正上方"), "northeast": ("右上", "右上角")},
    **{"west": ("左边", "左侧", "正左边"), "center": ("中间", "正中间", "中央"), "east": ("右边", "右侧", "正右边")},
    **{"southwest": ("左下", "左下角"), "south": ("下方", "正下方"), "southeast": ("右下", "右下角")},
}
CHINESE_SHAPES = {
    **{"circle": ("圆形", "圆圈", "圆"), "square": ("方形", "正方形", "方块")},
    **{"triangle": ("三角形", "三角"), "cross": ("十字", "十字形")},
}
ENGLISH_OBJECTS = ("object", "thing", "item", "one")  # "one": not alone
CHINESE_OBJECTS = ("物体", "东西", "图形", "那个")  # "那个": not in the plural

# what the drawn world never contains
THINGS = {
    "english": (
        *("dog", "cat", "car", "house", "tree", "person", "bird", "book", "table", "flower", "horse", "boat", "bus"),
        *("cup", "phone", "chair", "fish", "child", "girl", "boy", "train", "lamp", "star", "heart", "bicycle"),
        *("door",),
    ),
    "chinese": (
        *("狗", "猫", "汽车", "房子", "树", "人", "鸟", "书", "桌子", "花", "马", "船", "手机", "椅子", "鱼", "孩子"),
        *("女孩", "男孩", "火车", "灯", "星星", "自行车", "杯子", "飞机", "电脑", "门"),
    ),
}
FILLS = {
    "english": {
        "country": ("France", "China", "Japan", "Germany", "Brazil", "India", "Spain", "Egypt", "Canada", "Italy"),
        "food": ("rice", "bread", "soup", "fish", "pizza", "an apple", "tea", "noodles", "cake", "cheese"),
        "number": ("2", "3", "7", "12", "five", "ten", "20", "100"),
    },
    "chinese": {
        "country": ("法国", "中国", "日本", "德国", "巴西", "印度", "西班牙", "埃及", "加拿大", "意大利"),
        "food": ("米饭", "面包", "汤", "鱼", "饺子", "苹果", "茶", "面条", "蛋糕", "豆腐"),
        "number": ("2", "3", "7", "12", "五", "十", "20", "100"),
    },
}
