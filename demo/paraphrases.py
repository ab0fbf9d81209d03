"""Held-out wordings, ten of each type and language, written by hand: the evaluation alone asks with them.

None is in `demo/wordings.py` (a test compares them), so they show what happens to questions as people type them.
Slots and forms are those of `demo/wordings.py`.
"""

ENGLISH = {
    "colour": (
        *("of what color is the {}", "Could you say which colour that {} is?", "The {} has which colour?"),
        *("Colour of the {}?", "Any idea what colour the {} is?", "I'd like to know what color the {} has"),
        *("How would you name the colour of the {}?", "What's the colour you see on the {}?"),
        *("Look for the {} and tell me its colour.", "the {} - what color"),
    ),
    "shape": (
        *("what sort of shape does the {} have", "Could you say which shape that {} is?", "Shape of the {}?"),
        *("The {} has which shape?", "Any idea what shape the {} is?", "What shape do you see if you look at the {}?"),
        *("Look for the {} and tell me its shape.", "How would you name the shape of the {}?"),
        *("I'd like to know the shape the {} has", "the {} - what shape"),
    ),
    "count": (
        *("how many {s} are visible", "Number of {s}?", "Could you count all the {s} for me?"),
        *("How many {s} did they draw?", "I see some {s}. How many are they?", "Any idea how many {s} there are?"),
        *("What is the total number of {s}?", "How many {s} in total?", "Let me know how many {s} you find."),
        *("Say how many {s} this {image} contains.",),
    ),
    "position": (
        *("wheres the {} at", "Whereabouts is the {}?", "Could you say where that {} is?", "Show me where the {} is."),
        *("In what area of the {image} is the {}?", "Where should I look for the {}?", "Location of the {}?"),
        *("I can't find the {}, where is it?",),
    ),
    "at": ("What's that in the {}?", "Which thing do you find in the {}?"),
    "existence": (
        *("any {s} here?", "Is a {} visible?", "Could there be a {} in it?", "Does this {image} contain a {}?"),
        *("Do you notice a {}?", "Would you find a {} here?", "is there maybe a {} somewhere?"),
        *("Have they drawn a {}?", "I am looking for a {}. Is there one?", "Is it true that there is a {}?"),
    ),
    "compare": (
        *("would you say the {} is {more} than the {}", "Is it true that the {} is {more} than the {}?"),
        *("Next to the {1}, is the {0} {more}?", "Is the {} really {more} than the {}?"),
        *("Could you check if the {} is {more} than the {}?",),
    ),
    "which": (
        *("{}, {}: which one's {more}?", "Which would you say is {more}, the {} or the {}?"),
        *("Between the {} and the {}, which is {more}?",),
    ),
    "size": ("Would you call the {} large or small?", "Size of the {}?"),
    "description": (
        *(
            "what all is in the {image}",
            "Could you tell me what you see in the {image}?",
            "What is going on in this {image}?",
        ),
        *(
            "Give me all the objects you can find.",
            "Please explain the {image}.",
            "What are the things in the {image}?",
        ),
        *(
            "Describe everything here.",
            "Which things do you see?",
            "What did they draw?",
            "Make a list of what is there.",
        ),
    ),
    "unknown": (
        *("what's your job", "Who is the king of {country}?", "Will it snow tomorrow?", "Can you drive a car?"),
        *("What is the tallest mountain in the world?", "Do you know any songs?", "What did you eat for breakfast?"),
        *(
            "Which city is the largest in {country}?",
            "What is {number} minus {number}?",
            "Who is the person on the left?",
        ),
    ),
}
CHINESE = {
    "colour": (
        *("{}啥颜色", "{}的颜色是哪一种？", "你看{}是什么颜色的呀？", "能说说{}是什么颜色吗？", "请说明{}的颜色"),
        *("{}是用什么颜色画的？", "{}到底是什么颜色？", "帮我看一下{}的颜色", "猜猜{}是什么颜色", "{}的颜色呢？"),
    ),
    "shape": (
        *("{}啥形状", "{}的形状是哪一种？", "你看{}是什么形状的呀？", "能说说{}是什么形状吗？", "请说明{}的形状"),
        *("{}画的是什么形状？", "{}到底是什么形状？", "帮我看一下{}的形状", "猜猜{}是什么形状", "{}的形状呢？"),
    ),
    "count": (
        *(
            "{s}几个",
            "请数出{s}的个数",
            "总共能看见几个{s}？",
            "{image}上画了多少个{s}？",
            "{s}一共几个呀？",
            "能看见多少{s}？",
        ),
        *("这里面{s}有几个？", "帮我数数{s}", "到底有几个{s}？", "说说有多少个{s}"),
    ),
    "position": (
        *("{}在哪", "{}在哪一边？", "请指出{}的位置", "能说说{}在哪里吗？", "{}被画在什么地方？", "帮我找找{}在哪儿"),
        *("我没看到{}，它在哪里？", "{}到底在哪个位置？"),
    ),
    "at": ("{}的东西是什么？", "能说说{}是什么吗？"),
    "existence": (
        *(
            "有{}么",
            "请问是不是有{}？",
            "你有没有看到{}？",
            "{image}上画了{}没有？",
            "到底有没有{}？",
            "仔细找找有没有{}",
        ),
        *("{image}上有{}吗", "这里面是否存在{}？", "我在找{}，有吗？", "{}在{image}里有没有？"),
    ),
    "compare": (
        *("{}比{}{more}么", "你看{}是不是比{}{more}一些？", "{}是不是{more}过{}？", "请判断{}是否比{}更{more}"),
        *("{0}和{1}比，{0}更{more}吗？",),
    ),
    "which": ("{}跟{}哪一个{more}", "{}和{}中哪个更{more}一些？", "请比较{}和{}，谁{more}？"),
    "size": ("{}算大还是算小？", "请问{}大小如何？"),
    "description": (
        *(
            "{image}上有些什么",
            "请说说你看到的东西",
            "给我讲讲{image}",
            "{image}里画的都是什么？",
            "能说一下{image}的内容吗？",
        ),
        *(
            "请把看到的物体都说出来",
            "{image}的内容是什么？",
            "这是一幅什么样的画？",
            "具体描述{image}",
            "里面都有什么东西？",
        ),
    ),
    "unknown": (
        *(
            "你做什么工作",
            "{country}的国王是谁？",
            "后天会下雪吗？",
            "你会开车吗？",
            "世界上最高的山是哪座？",
            "你早饭吃了什么？",
        ),
        *("{country}最大的城市是哪个？", "{number}减{number}是多少？", "旁边那个人是谁？", "你会唱什么歌？"),
    ),
}
PARAPHRASES = {"english": ENGLISH, "chinese": CHINESE}
