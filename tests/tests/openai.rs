//! The OpenAI API of a whole node: real daemon, workers, router and model.

#![allow(
    clippy::unwrap_used,
    reason = "a test fails by panicking; the lint's exception covers test functions only"
)]

use std::fmt::Write;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use terrace_tests::node::{DEADLINE, Node, kill, model};

/// A client of one node.
#[derive(Clone)]
struct Api {
    http: reqwest::Client,
    url: String,
}

/// What a stream said, put together.
#[derive(Debug, Default)]
struct Streamed {
    text: String,
    finish: String,
    usage: Value,
    pieces: usize,
}

impl Streamed {
    /// Takes one event's JSON.
    fn take(&mut self, event: &Value) {
        assert!(event.get("error").is_none(), "{event}");
        for choice in event["choices"].as_array().unwrap() {
            let piece = choice["delta"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_default();
            self.text.push_str(piece);
            self.pieces += usize::from(!piece.is_empty());
            self.finish.push_str(choice["finish_reason"].as_str().unwrap_or_default());
        }
        if !event["usage"].is_null() {
            self.usage = event["usage"].clone();
        }
    }
}

impl Api {
    fn new(node: &Node) -> Self {
        let http = reqwest::Client::builder().no_proxy().timeout(DEADLINE).build().unwrap();
        Self { http, url: node.url.clone() }
    }

    async fn post(&self, route: &str, body: String) -> reqwest::Response {
        self.http.post(format!("{}{route}", self.url)).body(body).send().await.unwrap()
    }

    /// A request that must succeed.
    async fn ask(&self, route: &str, body: &Value) -> Value {
        let response = self.post(route, body.to_string()).await;
        let (status, text) = (response.status(), response.text().await.unwrap());
        assert!(status.is_success(), "{status}: {text}");
        serde_json::from_str(&text).unwrap()
    }

    async fn complete(&self, prompt: &str, extra: &Value) -> Value {
        self.ask("/v1/completions", &completion(prompt, extra)).await
    }

    /// How many answers were given up because their clients had gone.
    async fn cancelled(&self) -> u64 {
        let page = self.http.get(format!("{}/metrics", self.url)).send().await.unwrap().text().await.unwrap();
        let line = page.lines().find_map(|line| line.strip_prefix("terrace_router_cancelled_total "));
        line.unwrap_or_else(|| panic!("no count of cancelled answers in {page}")).parse().unwrap()
    }

    /// A streamed request; `seen` is called after each event with what there is so far.
    async fn stream(&self, route: &str, body: &Value, mut seen: impl FnMut(&Streamed)) -> Streamed {
        let mut body = body.clone();
        body["stream"] = json!(true);
        body["stream_options"] = json!({"include_usage": true});
        let mut response = self.post(route, body.to_string()).await;
        assert_eq!(response.status(), 200);
        let (mut bytes, mut all) = (Vec::new(), Streamed::default());
        while let Some(chunk) = response.chunk().await.unwrap() {
            bytes.extend_from_slice(&chunk);
            while let Some(end) = bytes.windows(2).position(|two| two == b"\n\n") {
                let event = String::from_utf8(bytes.drain(..end + 2).collect()).unwrap();
                match event.trim_end().strip_prefix("data: ") {
                    Some("[DONE]") => return all,
                    Some(data) => all.take(&serde_json::from_str(data).unwrap()),
                    None => assert!(event.starts_with(':'), "{event}"),
                }
                seen(&all);
            }
        }
        panic!("the stream ended without [DONE]: {all:?}");
    }
}

fn completion(prompt: &str, extra: &Value) -> Value {
    let mut body = json!({"prompt": prompt, "max_tokens": 16, "temperature": 0});
    for (name, value) in extra.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

fn text(answer: &Value) -> String {
    let choice = &answer["choices"][0];
    choice["text"].as_str().or(choice["message"]["content"].as_str()).unwrap().to_owned()
}

fn cached(answer: &Value) -> u64 {
    answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
}

/// Some 25 tokens a line, different for each `story`.
fn story(story: &str, lines: usize) -> String {
    (0..lines).fold(String::new(), |mut text, line| {
        write!(
            text,
            "In the {story} chapter, on page {line}, the captain of the old ship wrote down the weather. "
        )
        .unwrap();
        text
    })
}

/// The first thing a user tries: a chat must answer, streamed and not, with the same words and numbers.
async fn chat_answers_and_streams_the_same(api: &Api) {
    let body = json!({
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0, "max_tokens": 40,
    });
    let whole = api.ask("/v1/chat/completions", &body).await;
    assert!(text(&whole).contains("Paris"), "{whole}");
    let streamed = api.stream("/v1/chat/completions", &body, |_| {}).await;
    assert_eq!(streamed.text, text(&whole));
    assert_eq!(streamed.finish, whole["choices"][0]["finish_reason"]);
    assert!(streamed.pieces > 1, "it came in one piece: {streamed:?}");
    for field in ["prompt_tokens", "completion_tokens", "total_tokens"] {
        assert_eq!(streamed.usage[field], whole["usage"][field], "{field}");
    }
}

/// Asking twice must be answered from the cache, with the same words; another prompt with the same
/// beginning must share that beginning only.
async fn the_second_time_comes_from_the_cache(api: &Api) {
    let prompt = story("first", 20);
    let cold = api.complete(&prompt, &json!({})).await;
    let tokens = cold["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(tokens > 300 && cached(&cold) == 0, "{cold}");
    let warm = api.complete(&prompt, &json!({})).await;
    assert_eq!(text(&warm), text(&cold));
    assert!(cached(&warm) + 16 >= tokens && cached(&warm) < tokens, "{warm}");
    let longer = api.complete(&format!("{prompt}Then the storm came."), &json!({})).await;
    assert!(cached(&longer) >= cached(&warm), "{longer}");
    let other = api.complete(&format!("Elsewhere. {prompt}"), &json!({})).await;
    assert_eq!(cached(&other), 0, "{other}");
}

/// Limits, stop texts and seeds must do what they say: the stop text and all after it is not shown; the
/// same seed gives the same text, and seeds matter.
async fn settings_are_obeyed(api: &Api) {
    let plain = api.complete("The colours of the rainbow are", &json!({"max_tokens": 24})).await;
    let words = text(&plain);
    let stop: String = words.chars().skip(9).take(3).collect();
    let expected = words.split(&stop).next().unwrap();
    let stopped =
        api.complete("The colours of the rainbow are", &json!({"max_tokens": 24, "stop": [stop]})).await;
    assert_eq!(
        (text(&stopped).as_str(), &stopped["choices"][0]["finish_reason"]),
        (expected, &json!("stop"))
    );
    let short = api.complete("The colours of the rainbow are", &json!({"max_tokens": 3})).await;
    assert_eq!(short["usage"]["completion_tokens"], 3);
    assert_eq!(short["choices"][0]["finish_reason"], "length");
    assert!(words.starts_with(&text(&short)), "{short}");
    let mut texts = Vec::new();
    for seed in [1, 2, 3] {
        let extra = json!({"temperature": 1.2, "top_p": 0.95, "seed": seed});
        let once = text(&api.complete("Once upon a time", &extra).await);
        assert_eq!(once, text(&api.complete("Once upon a time", &extra).await), "seed {seed}");
        texts.push(once);
    }
    texts.dedup();
    assert!(texts.len() > 1, "three seeds gave one text: {texts:?}");
}

/// Requests at once share the workers' steps; none may see another's words.
async fn requests_at_once_do_not_mix(api: &Api) {
    let prompts: Vec<String> = (0..6).map(|index| story(&format!("number {index}"), 2 + index)).collect();
    let asked: Vec<_> = prompts
        .iter()
        .map(|prompt| {
            let (api, prompt) = (api.clone(), prompt.clone());
            tokio::spawn(async move { text(&api.complete(&prompt, &json!({})).await) })
        })
        .collect();
    let mut together = Vec::new();
    for answer in asked {
        together.push(answer.await.unwrap());
    }
    for (prompt, together) in prompts.iter().zip(&together) {
        assert_eq!(&text(&api.complete(prompt, &json!({})).await), together, "{prompt}");
    }
}

/// Bad input must be refused with the right status in OpenAI's shape, and leave the node as it was.
async fn bad_input_is_refused(api: &Api) {
    let long = completion(&story("long", 400), &json!({})).to_string();
    let cases = [
        ("{\"prompt\": \"x\"".to_owned(), 400, "not valid JSON"),
        (long, 400, "context is"),
        (completion(&"y".repeat(5 << 20), &json!({})).to_string(), 413, "4194304 bytes"),
        (completion("x", &json!({"model": "other"})).to_string(), 404, "`other` does not exist"),
        (completion("x", &json!({"temperature": 9})).to_string(), 400, "`temperature`"),
    ];
    for (body, status, word) in cases {
        let response = api.post("/v1/completions", body).await;
        let (found, text) = (response.status().as_u16(), response.text().await.unwrap());
        assert_eq!(found, status, "{text}");
        let body: Value = serde_json::from_str(&text).unwrap();
        assert!(body["error"]["message"].as_str().unwrap().contains(word), "{text}");
    }
}

/// A client that goes away in mid-stream must leave no lease behind, and nobody who computes on.
async fn a_disconnect_frees_every_lease(api: &Api, node: &Node) {
    for (route, before) in [("streamed", 0), ("waiting", 1)] {
        assert_eq!(api.cancelled().await, before);
        let extra = json!({"max_tokens": 1500, "stream": route == "streamed"});
        let body = completion(&story(route, 10), &extra).to_string();
        if route == "streamed" {
            let mut response = api.post("/v1/completions", body).await;
            for _ in 0..3 {
                assert!(response.chunk().await.unwrap().is_some());
            }
            assert!(node.admin_json(&["lease", "ls"])["total"].as_u64().unwrap() > 0, "nothing is leased");
        } else {
            let waiting = tokio::time::timeout(Duration::from_millis(700), api.post("/v1/completions", body));
            assert!(waiting.await.is_err(), "1500 tokens came at once");
        }
        let began = Instant::now();
        // The end of the last lease could be that of the whole answer. The client's side of the connection is closed by a
        // task beside this one, so nothing here may keep the thread.
        while api.cancelled().await == before || node.admin_json(&["lease", "ls"])["total"] != 0 {
            assert!(began.elapsed() < DEADLINE, "waited in vain for the end of all leases");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// One node through everything a client does. One test, as a node needs both cores.
#[tokio::test]
async fn a_node_speaks_openai() {
    let Some(model) = model() else { return };
    let node = Node::start(&model, &[]);
    let api = Api::new(&node);
    chat_answers_and_streams_the_same(&api).await;
    the_second_time_comes_from_the_cache(&api).await;
    settings_are_obeyed(&api).await;
    requests_at_once_do_not_mix(&api).await;
    bad_input_is_refused(&api).await;
    a_disconnect_frees_every_lease(&api, &node).await;
    chat_answers_and_streams_the_same(&api).await;
}

/// A worker that is killed in the middle of an answer must cost the client nothing but time: no token
/// twice, none missing. Every worker is killed at once, so that the answer goes on in a new process.
#[tokio::test]
async fn an_answer_survives_its_worker() {
    let Some(model) = model() else { return };
    let node = Node::start(&model, &[]);
    let api = Api::new(&node);
    let body = completion(&story("killed", 4), &json!({"max_tokens": 120}));
    let whole = text(&api.ask("/v1/completions", &body).await);
    let mut killed = false;
    let streamed = api
        .stream("/v1/completions", &body, |so_far| {
            if so_far.pieces == 20 && !std::mem::replace(&mut killed, true) {
                let workers = node.children().into_iter().filter(|(_, name)| name == "terrace-worker");
                workers.for_each(|(pid, _)| kill(pid, "-KILL"));
            }
        })
        .await;
    assert!(killed, "the answer was too short: {streamed:?}");
    assert_eq!(streamed.text, whole);
    assert_eq!(streamed.usage["completion_tokens"].as_u64(), Some(120));
}
