//! Answers that outlive their workers: real processes, killed, stopped and drained in mid-stream. What the
//! client reads must be what it would have read without.

#![allow(
    clippy::unwrap_used,
    reason = "a test fails by panicking; the lint's exception covers test functions only"
)]

use std::fmt::Write;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use terrace_client::signals::Follower;
use terrace_proto::v1::{WorkerLoad, WorkerRole};
use terrace_tests::node::{DEADLINE, Node, alive, kill, model, wait_until};

/// What a stream said, put together.
#[derive(Debug, Default, PartialEq)]
struct Streamed {
    text: String,
    finish: String,
    usage: Value,
    pieces: usize,
}

/// A node with two decode workers, and what its workers say of themselves.
struct Two {
    node: Node,
    reports: Follower,
    http: reqwest::Client,
}

impl Two {
    fn start(extra: &[&str]) -> Option<Self> {
        let model = model()?;
        let node = Node::start(&model, &[&["--decode", "2"], extra].concat());
        let reports = Follower::start(node.running()["grpc"].as_str().unwrap());
        let http = reqwest::Client::builder().no_proxy().timeout(DEADLINE).build().unwrap();
        let two = Self { node, reports, http };
        two.wait_for_both();
        Some(two)
    }

    /// The last reports.
    fn loads(&self) -> Vec<WorkerLoad> {
        self.reports.reports().borrow().workers.clone()
    }

    /// Waits until two decode workers report that they have nothing to do.
    fn wait_for_both(&self) {
        let idle = |load: &&WorkerLoad| {
            load.role() == WorkerRole::Decode
                && !load.draining
                && load.active_requests == 0
                && alive(load.pid)
        };
        wait_until(|| self.loads().iter().filter(idle).count() == 2, "two idle decode workers");
    }

    /// The decode worker that has the request.
    fn serving(&self) -> WorkerLoad {
        let mut found = None;
        wait_until(
            || {
                let busy = |load: &WorkerLoad| load.role() == WorkerRole::Decode && load.active_requests > 0;
                found = self.loads().into_iter().find(|load| busy(load));
                found.is_some()
            },
            "a decode worker that is busy",
        );
        found.unwrap()
    }

    /// A streamed completion; `act` is called once, when so many pieces have come.
    async fn stream(&self, body: &Value, at: usize, act: impl FnOnce()) -> Streamed {
        let mut body = body.clone();
        body["stream"] = json!(true);
        body["stream_options"] = json!({"include_usage": true});
        let url = format!("{}/v1/completions", self.node.url);
        let mut response = self.http.post(url).body(body.to_string()).send().await.unwrap();
        assert_eq!(response.status(), 200);
        let (mut bytes, mut all, mut act) = (Vec::new(), Streamed::default(), Some(act));
        while let Some(chunk) = response.chunk().await.unwrap() {
            bytes.extend_from_slice(&chunk);
            while let Some(end) = bytes.windows(2).position(|two| two == b"\n\n") {
                let event = String::from_utf8(bytes.drain(..end + 2).collect()).unwrap();
                match event.trim_end().strip_prefix("data: ") {
                    Some("[DONE]") => {
                        assert!(act.is_none(), "the answer was too short: {all:?}");
                        return all;
                    }
                    Some(data) => all.take(&serde_json::from_str(data).unwrap()),
                    None => assert!(event.starts_with(':'), "{event}"),
                }
                if all.pieces >= at
                    && let Some(act) = act.take()
                {
                    act();
                }
            }
        }
        panic!("the stream ended without [DONE]: {all:?}");
    }

    /// The same request, undisturbed and with `act` in its middle: text, end and usage must be equal.
    async fn survives(&self, what: &str, body: &Value, at: usize, act: impl FnOnce(&WorkerLoad)) {
        self.wait_for_both();
        // The first one fills the cache, so that both others find the same in it.
        self.stream(body, 0, || ()).await;
        let whole = self.stream(body, 0, || ()).await;
        self.wait_for_both();
        let cut = self.stream(body, at, || act(&self.serving())).await;
        assert_eq!(
            (&cut.text, &cut.finish, &cut.usage),
            (&whole.text, &whole.finish, &whole.usage),
            "{what}"
        );
    }
}

impl Streamed {
    /// Takes one event's JSON.
    fn take(&mut self, event: &Value) {
        assert!(event.get("error").is_none(), "{event}");
        for choice in event["choices"].as_array().unwrap() {
            let piece = choice["text"].as_str().unwrap_or_default();
            self.text.push_str(piece);
            self.pieces += usize::from(!piece.is_empty());
            self.finish.push_str(choice["finish_reason"].as_str().unwrap_or_default());
        }
        if !event["usage"].is_null() {
            self.usage = event["usage"].clone();
        }
    }
}

/// Some 20 tokens a line.
fn story(story: &str, lines: usize) -> String {
    (0..lines).fold(String::new(), |mut text, line| {
        write!(text, "On page {line} of the {story} the captain wrote down the weather of the day. ")
            .unwrap();
        text
    })
}

/// A piece of the last third that does not come before: the model likes to say things twice.
fn late_text(whole: &str) -> &str {
    let starts = whole.char_indices().map(|(at, _)| at).filter(|at| at * 3 >= whole.len() * 2);
    let pieces = starts.filter_map(|at| Some((at, whole.get(at..at + 8)?)));
    let mut new = pieces.filter(|(at, piece)| whole.find(piece) == Some(*at));
    new.next().unwrap_or_else(|| panic!("the answer says nothing new at its end: {whole}")).1
}

fn completion(prompt: &str, extra: &Value) -> Value {
    let mut body = json!({"prompt": prompt, "max_tokens": 60, "temperature": 0});
    for (name, value) in extra.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

/// A decode worker that is killed in mid-stream must cost the client nothing but a moment: the other one goes on
/// from the stored blocks. Greedy and drawn, with characters of several tokens, and with a stop text far behind
/// the cut; stopped (a process that hangs with its connections alive); drained, with and without time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_goes_on_with_the_other_worker() {
    let Some(two) = Two::start(&[]) else { return };
    let killed = |load: &WorkerLoad| kill(load.pid, "-KILL");
    two.survives("greedy", &completion(&story("greedy", 4), &json!({})), 20, killed).await;
    let drawn = json!({"temperature": 0.9, "top_p": 0.95, "seed": 11});
    two.survives("drawn", &completion(&story("drawn", 4), &drawn), 9, killed).await;
    let faces = "\u{1f600} \u{e9}t\u{e9} \u{1f680} na\u{ef}ve \u{1f600} \u{e9}t\u{e9} \u{1f680} na\u{ef}ve "
        .repeat(3);
    two.survives("characters of several tokens", &completion(&faces, &json!({})), 5, killed).await;
    // Numbers, for the model goes on counting where it would tell a story twice.
    let numbers: String = (1..20).fold(String::new(), |text, number| text + &format!("{number}, "));
    let whole = two.stream(&completion(&numbers, &json!({})), 0, || ()).await.text;
    let stop = json!({"stop": [late_text(&whole)]});
    two.survives("stop text", &completion(&numbers, &stop), 4, killed).await;

    let mut frozen = 0;
    let began = Instant::now();
    let body = completion(&story("frozen", 4), &json!({}));
    let freezes = |load: &WorkerLoad| {
        frozen = load.pid;
        kill(load.pid, "-STOP");
    };
    two.survives("frozen", &body, 12, freezes).await;
    assert!(began.elapsed() < Duration::from_secs(120), "it took {:?}", began.elapsed());
    kill(frozen, "-KILL");

    // More tokens than ten seconds are enough for, so that it is given back in its middle.
    let body = completion(&story("drained", 4), &json!({"max_tokens": 400}));
    let mut left = 0;
    let leaves = |load: &WorkerLoad| {
        left = load.pid;
        kill(load.pid, "-TERM");
    };
    two.survives("drained by a signal", &body, 12, leaves).await;
    wait_until(|| !alive(left), "the end of the drained worker");
}

/// A prefill worker that dies while it computes a prompt: what it has sealed stays, decode computes the rest.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dying_prefill_costs_only_time() {
    let Some(two) = Two::start(&[]) else { return };
    let prompt = story("long", 60);
    let body = completion(&prompt, &json!({"max_tokens": 8}));
    let prefill = two.loads().into_iter().find(|load| load.role() == WorkerRole::Prefill).unwrap();
    let busy = || two.loads().iter().any(|load| load.pid == prefill.pid && load.active_requests > 0);
    let asked = two.stream(&body, 0, || ());
    let dies = async {
        let deadline = Instant::now() + DEADLINE;
        while !busy() {
            assert!(Instant::now() < deadline, "the prompt never went to the prefill worker");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        kill(prefill.pid, "-KILL");
    };
    let (cut, ()) = tokio::join!(asked, dies);
    let whole = two.stream(&body, 0, || ()).await;
    assert_eq!((&cut.text, &cut.finish), (&whole.text, &whole.finish));
    assert_eq!(cut.usage["completion_tokens"], whole.usage["completion_tokens"]);
    assert_eq!(two.node.admin_json(&["info"])["degraded"], false);
}
