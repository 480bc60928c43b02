"""The studio's words in Chinese. English is what stands in the code, in `_("...")`, and is the key here.

A test holds the table to the code: every sentence has its line, every line its sentence, and both hold the same
{places}.
"""
from __future__ import annotations

import streamlit as st

LANGUAGES = {"en": "English", "zh": "中文"}


def gettext(text: str, **values: object) -> str:
    """The sentence in the language of whoever is looking, with its places filled."""
    words = ZH.get(text, text) if st.session_state.get("language") == "zh" else text
    return words.format(**values) if values else words


ZH = {
    # the frame
    "Chat": "对话", "Compare": "对比", "Runs": "训练", "Tokens": "词元", "Inside": "内部",
    "serving at": "服务地址", "no answer from": "没有响应：", "ended:": "已结束：",
    "The server has ended": "服务器已结束", "Its exit code is {code}.": "退出码：{code}。",
    "It said nothing of why. The system may have ended it for want of memory.":
        "它没有说明原因。可能因内存不足而被系统终止。",
    "Its last words:": "最后的输出：", "Start again": "重新启动",
    "This model has read texts only: it goes on with them, it does not answer.":
        "这个模型只读过文本：它会续写，不会回答问题。",
    "Begin a text": "输入文本的开头", "How does the text begin?": "文本从哪里开始？",
    "There is no server.": "没有服务器。",
    "No model is being served": "还没有可用的模型",
    "Name a model directory, or the address of a server:": "请给出模型目录，或服务器地址：",
    "No model yet? `mindseed demo` grows one in a few minutes.": "还没有模型？`mindseed demo` 几分钟就能训练一个。",
    "The server is starting": "服务器正在启动",
    "It loads the models and will answer at `{server}`.": "正在加载模型，稍后可从 `{server}` 访问。",
    "The server does not answer": "服务器没有响应",
    "Nothing answers at `{server}`.": "`{server}` 没有响应。",
    "Start it: `mindseed serve DIR`. This page looks for it again by itself.":
        "请启动：`mindseed serve DIR`。本页会自动重新连接。",
    "What the server says": "服务器的输出",
    "Loading the model ...": "正在加载模型……",
    "{path} has no tokenizer.json; name a model directory or that of a tokenizer.":
        "{path} 里没有 tokenizer.json；请给出模型目录或分词器目录。",
    "Model directory": "模型目录", "Choose one, or type a path": "选择一个，或输入路径",
    # conversations
    "New chat": "新对话", "and {n} older ones": "还有 {n} 个更早的对话",
    "What shall we talk about?": "想聊点什么？", "Everything stays on this computer.": "所有内容都留在这台电脑上。",
    "Ask something": "输入问题", "Edit": "编辑", "Ask again": "重新提问", "Cancel": "取消", "Stop": "停止",
    "Edit and ask again": "修改后重新提问", "Answer again": "重新回答", "Answer": "回答",
    "Title": "标题", "Export as JSON lines": "导出为 JSON 行", "Export as Markdown": "导出为 Markdown",
    "One row that `mindseed train` reads. Answers that are only half there stay out.":
        "一行数据，可直接用于 `mindseed train`。未写完的回答不会导出。",
    "Export all conversations": "导出全部对话",
    "JSON lines: a file to fine-tune on with `mindseed train`. Answers that are only half there stay out.":
        "JSON 行文件，可用 `mindseed train` 微调。未写完的回答不会导出。",
    "Delete this conversation": "删除这个对话", "Delete for good": "彻底删除",
    "Export, rename, delete": "导出、重命名、删除",
    "The conversation that was here has been deleted elsewhere; this is a new one.":
        "原来的对话已在别处删除；这是一个新对话。",
    "The question alone does not fit into the model's context. Shorten it.": "单是这个问题就超出了模型的上下文。请缩短问题。",
    "The question, with the system prompt and the tools, has {n} tokens; the model's context is {m}, and the answer "
    "needs room in it, too. Shorten it.":
        "问题连同系统提示词和工具共有 {n} 个词元；模型的上下文是 {m} 个，还要给回答留出空间。请缩短问题。",
    "What came from {server} is not the answer of a model server ({what}). Check the address, and that "
    "`mindseed serve` or another server of the OpenAI API runs there.":
        "{server} 返回的内容不是模型服务器的回答（{what}）。请检查地址，并确认那里运行着 `mindseed serve` 或其他 OpenAI API 服务器。",
    "its form is not that of the API": "格式不符合 API", "it is no JSON": "不是 JSON",
    "no piece of an answer is in it": "其中没有回答", "it stops before the answer's end": "回答没有结束就中断了",
    "The connection to {server} failed ({what}). Ask again; if it fails again, see whether the server still runs.":
        "与 {server} 的连接失败（{what}）。请重新提问；如果再次失败，请检查服务器是否仍在运行。",
    "The context is full: the oldest part of the conversation was left out.": "上下文已满：最早的对话内容没有发送。",
    "The model called tools again and again, and was stopped.": "模型反复调用工具，已被停止。",
    "Thoughts": "思考过程", "reading ...": "正在阅读……", "error": "错误",
    "{n} tokens": "{n} 个词元", "{n} tokens/s": "{n} 词元/秒",
    "cut at the limit": "达到长度上限", "the context is full": "上下文已满", "stopped": "已停止", "broken off": "中途断开",
    # settings
    "Model": "模型", "Thinks first": "先思考", "as it likes": "自动", "always": "开", "never": "关",
    "Tools": "工具", "Settings": "设置", "the model's own": "模型默认",
    "sums and formulas": "算式和公式", "the time in a city": "某个城市的时间", "today's date": "今天的日期",
    "one unit into another": "单位换算", "dice": "掷骰子",
    "the weather in a city of the toy world (invented)": "玩具世界里某城市的天气（虚构）",
    "a phone number of the toy world (invented)": "玩具世界里某人的电话（虚构）",
    "Its answer must begin with a call": "回答必须先调用工具",
    "System prompt": "系统提示词",
    "What the model should know or be before the first question": "提问之前，模型应当知道什么、扮演什么",
    "Questions sent along": "附带的历史提问", "all of them": "全部", "of the past, with their answers": "过去的提问及其回答",
    "Temperature": "温度", "0: always the likeliest token; higher: bolder": "0：总选最可能的词元；越高越大胆",
    "choose among the k likeliest tokens; 0: all": "只在最可能的 k 个词元中选择；0：全部",
    "choose among the likeliest tokens with this much probability together": "只在累计概率达到该值的最可能词元中选择",
    "Seed": "随机种子", "random": "随机",
    "the same seed gives the same answers": "相同的种子得到相同的回答",
    "Longest answer, in tokens": "最大回答长度（词元）",
    "at most the model's context, {n}": "不超过模型的上下文长度 {n}",
    # comparing
    "one prompt, two models": "一个问题，两个模型", "Ask both": "同时提问",
    "The prompt is": "输入是", "a question": "一个问题", "a plain text": "一段文本",
    "What does each of them say?": "它们各自会怎么回答？",
    "Ask below; both answer at once, with the same settings.": "在下方提问；两个模型以相同的设置同时回答。",
    "Serve two stages of a run to see what the second has learnt:": "同时加载一次训练的两个阶段，看看后一阶段学到了什么：",
    "first token after {n} ms": "首个词元 {n} 毫秒",
    # runs
    "training, while it goes on": "实时查看训练过程",
    "No runs yet": "还没有训练记录",
    "A run appears here with its first step. Start one:": "训练迈出第一步后就会出现在这里。开始训练：",
    "Runs are looked for in {places}; `mindseed ui --runs DIR` names other folders.":
        "训练记录的查找位置：{places}；可用 `mindseed ui --runs DIR` 指定其他文件夹。",
    "Choose runs": "选择训练", "No run is chosen": "没有选择训练", "Choose one or several above.": "请在上方选择一个或多个。",
    "Along": "横轴", "steps": "步数", "minutes": "分钟", "tokens": "词元", "step": "步",
    "Smoothing": "平滑", "How much a value counts that is one step older": "前一步的值所占的权重",
    "Logarithmic loss": "损失用对数轴", "Logarithmic steps": "横轴用对数轴", "Refresh by itself": "自动刷新",
    "Loss": "损失", "loss": "损失", "nats per token": "奈特/词元", "Held-out text": "验证文本", "bits per byte": "比特/字节",
    "Learning rate": "学习率", "Gradient norm": "梯度范数", "Speed": "速度", "tokens/s": "词元/秒",
    "Busiest expert": "最忙的专家", "multiple of the mean": "平均值的倍数",
    "Router entropy": "路由熵", "0: sure, 1: all the same": "0：确定，1：均匀",
    "running": "训练中", "done": "已完成", "left": "剩余", "time": "用时",
    "damaged": "已损坏",
    "{run}: lines of log.jsonl that are damaged and were left out: {n}": "{run}：log.jsonl 中有 {n} 行损坏，已跳过。",
    "{run}: run.json is damaged, so its command and its machine are not known.":
        "{run}：run.json 已损坏，因此无法得知命令和机器。",
    "Load of the experts": "专家负载", "Mixture": "专家层", "mixture {n}": "专家层 {n}", "× mean": "× 平均",
    "Samples": "样本", "Options": "配置", "Step": "步",
    "This run has printed no samples (loop.sample_every).": "这次训练没有输出样本（loop.sample_every）。",
    "Where they differ": "不同之处", "started": "开始时间", "machine": "机器", "version": "版本", "commit": "提交",
    "config.toml is missing": "缺少 config.toml", "option": "选项", "run": "训练", "value": "值",
    # tokens
    "what a model reads instead of letters": "模型读到的不是字母，而是词元",
    "No tokenizer yet": "还没有分词器",
    "This page reads the tokenizer of a model directory. Name one:": "本页读取模型目录里的分词器。请给出一个：",
    "Text": "文本", "Type something.": "请输入文本。",
    "Spellings of special tokens become special tokens": "把特殊词元的写法当作特殊词元",
    "Off, as for everything that a user or a web page writes: a text cannot spell markup.":
        "关闭时与对待用户和网页的文本一样：文本无法写出标记。",
    "The first {n} are shown.": "只显示前 {n} 个。",
    "characters": "字符", "bytes": "字节", "bytes per token": "字节/词元", "different tokens": "不同词元",
    "vocabulary": "词表大小", "token": "词元", "merge {n}": "第 {n} 次合并",
    "How this token came about": "这个词元是怎样合并出来的",
    "It is a special token: it was put into the vocabulary, and no text can spell it.":
        "这是特殊词元：直接放入词表，任何文本都无法写出它。",
    "This tokenizer has a token for every byte, and no merges.": "这个分词器每个字节一个词元，没有合并。",
    "No merges make it; it was put into the vocabulary as a whole.": "它不是合并出来的，而是整体放入词表的。",
    "It is a single byte, {byte}: where every text begins.": "它是单个字节 {byte}：一切文本的起点。",
    "It is taken as a whole, without merges.": "它作为整体使用，没有合并。",
    "The merge that was learnt first goes first; this vocabulary has {n} of them.":
        "先学到的合并先执行；这个词表共有 {n} 次合并。",
    "The text is not valid Unicode.": "文本不是有效的 Unicode。",
    # inside
    "what happens between the prompt and the next token": "从输入到下一个词元之间发生了什么",
    "No model yet": "还没有模型", "This page opens a model directory itself. Name one:": "本页直接打开模型目录。请给出一个：",
    "Prompt": "输入", "The prompt has {n} tokens; the last {m} are looked at.": "输入共有 {n} 个词元；只看最后 {m} 个。",
    "Attention": "注意力", "Layer by layer": "逐层预测", "Experts": "专家",
    "Layers {layers}: linear attention keeps a fading memory of fixed size instead of looking back at single tokens, "
    "so there is no map to show.": "第 {layers} 层：线性注意力用固定大小、逐渐淡忘的记忆代替对单个词元的回看，因此没有注意力图。",
    "{n} layers": "{n} 层", "layers {layers}: {words}": "第 {layers} 层：{words}", "dim {n}": "维度 {n}",
    "{n} heads of {width} ({kv} kv)": "{n} 个头，每头 {width} 维（{kv} 个键值头）",
    "{n} heads of {width}": "{n} 个头，每头 {width} 维", "window {n}": "窗口 {n}", "no rotation": "无旋转位置编码",
    "latent attention, {n} heads of {width}, latent {rank}": "潜在注意力，{n} 个头，每头 {width} 维，潜在维度 {rank}",
    "gated delta rule": "门控 delta 规则", "gated linear attention": "门控线性注意力",
    "{k} of {e} experts of {width}": "{e} 个专家选 {k} 个，每个 {width} 维", " + shared {n}": "，共享专家 {n} 维",
    "feed-forward {n}": "前馈 {n}", "{norm} norm": "{norm} 归一化", "{place}-norm": "{place} 位置归一化",
    "learned positions": "可学习的位置编码", "predicts {n} further tokens": "另外预测 {n} 个后续词元",
    "vocabulary {n}": "词表 {n}", "context {n}": "上下文 {n}",
    "Layer": "层", "layer": "层", "Head": "头", "mean": "平均", "head {n}": "头 {n}", "Looking from": "从哪个词元看",
    "The stronger its colour, the more the chosen token looks at it.": "颜色越浓，所选词元对它的注意越多。",
    "All heads of this layer": "这一层的所有头", "looking": "看的词元", "looked at": "被看的词元", "weight": "权重",
    "The last norm and the head, put on after every layer: what would come next if the model ended there? The top row "
    "is what it does say.": "在每一层之后接上最后的归一化和输出头：如果模型到此为止，会预测什么？最上面一行是模型真正的输出。",
    "From token": "起始词元", "embedding": "嵌入", "layer {n}": "第 {n} 层", "Next token after": "在此之后的下一个词元",
    "as seen by": "由哪一层预测", "after": "在此之后", "would say": "会说", "probability": "概率",
    "No mixture of experts": "没有混合专家",
    "Every layer of this model has one feed-forward, which all tokens pass. Make a mixture of it:":
        "这个模型每层只有一个前馈网络，所有词元都经过它。把它变成混合专家：",
    "{k} of {e} experts per token": "每个词元选 {e} 个专家中的 {k} 个",
    "and one that all tokens pass": "外加一个所有词元都经过的共享专家",
    "Which token goes where": "词元的去向", "How often each is asked": "各专家被选中的比例", "expert": "专家", "share": "比例",
}
