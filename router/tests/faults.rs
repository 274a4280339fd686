//! What clients see when workers fail, bodies are bad, or the client goes away.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends here")]

mod faults {
    pub(crate) mod fleet;
}

use std::sync::atomic::Ordering;
use std::time::Duration;

use faults::fleet::{ANSWER, Act, DEADLINE, Fleet, question, until};
use serde_json::{Value, json};
use terrace_proto::v1::WorkerRole::{Decode, Prefill};

/// Text of a streamed answer, its finish reasons, and its usage.
fn streamed(body: &str) -> (String, Vec<String>, Value) {
    let (mut text, mut reasons, mut usage) = (String::new(), Vec::new(), Value::Null);
    assert!(body.ends_with("data: [DONE]\n\n"), "{body}");
    for event in body.split_terminator("\n\n").filter(|event| *event != "data: [DONE]") {
        let event: Value = serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap();
        for choice in event["choices"].as_array().unwrap() {
            let piece = choice["text"].as_str().or(choice["delta"]["content"].as_str());
            text.push_str(piece.unwrap_or_default());
            reasons.extend(choice["finish_reason"].as_str().map(str::to_owned));
        }
        if !event["usage"].is_null() {
            usage = event["usage"].clone();
        }
    }
    (text, reasons, usage)
}

/// Two ways to the same answer must not differ: a stream's pieces, joined, are the whole answer, and the
/// usage is the same.
#[tokio::test]
async fn streaming_equals_not_streaming() {
    let fleet = Fleet::start(&[(Decode, &[])], &[]).await;
    let (status, whole) = fleet.ask(&json!({})).await;
    assert_eq!((status, &whole["choices"][0]["text"]), (200, &json!(ANSWER)));
    assert_eq!(whole["choices"][0]["finish_reason"], "stop");
    assert_eq!(whole["usage"]["prompt_tokens_details"]["cached_tokens"], 3);
    let extra = json!({"stream": true, "stream_options": {"include_usage": true}});
    let (status, headers, body) = fleet.post("/v1/completions", question(&extra)).await;
    assert_eq!(
        (status, headers["content-type"].to_str().unwrap()),
        (200, "text/event-stream; charset=utf-8")
    );
    let (text, reasons, usage) = streamed(&body);
    assert_eq!((text.as_str(), reasons), (ANSWER, vec!["stop".to_owned()]));
    assert_eq!(usage, whole["usage"]);
    let chat = json!({"messages": [{"role": "user", "content": "say it?"}], "stream": true});
    let (_, _, body) = fleet.post("/v1/chat/completions", chat.to_string()).await;
    assert_eq!(streamed(&body).0, ANSWER);
    assert!(body.contains("\"role\":\"assistant\""), "{body}");
}

/// Limits and stop texts end an answer early, tell why, and end the call to the worker as well.
#[tokio::test]
async fn answers_end_where_they_are_told_to() {
    let fleet = Fleet::start(&[(Decode, &[Act::Answer, Act::Hang(1000)])], &[]).await;
    let (_, body) = fleet.ask(&json!({"max_tokens": 3})).await;
    assert_eq!(body["choices"][0]["finish_reason"], "length");
    assert_eq!(body["usage"]["completion_tokens"], 3);
    let (_, body) = fleet.ask(&json!({"stop": ["nowhere", " END"]})).await;
    let expected = ANSWER.split(" END").next().unwrap();
    assert_eq!(body["choices"][0]["text"], expected);
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    // The second worker call would hang for ever; the stop text must have ended it.
    tokio::time::timeout(DEADLINE, fleet.workers[0].dropped.notified()).await.unwrap();
    until("both calls are over", || fleet.router.metrics.in_progress.get() == 0).await;
}

/// A worker that dies in the middle must cost no token and repeat none, whether it breaks the stream or
/// just ends it; so must one that dies before its first token.
#[tokio::test]
async fn an_answer_goes_on_when_its_worker_dies() {
    for act in [Act::Break(0), Act::Break(4), Act::EndEarly(7), Act::Break(1000)] {
        let fleet = Fleet::start(&[(Decode, &[act]), (Decode, &[act])], &[]).await;
        let extra = json!({"stream": true, "seed": 5, "stream_options": {"include_usage": true}});
        let (_, _, body) = fleet.post("/v1/completions", question(&extra)).await;
        let (text, reasons, usage) = streamed(&body);
        assert_eq!((text.as_str(), reasons.len()), (ANSWER, 1), "{act:?}");
        assert_eq!(usage["completion_tokens"], fleet.tokenizer.encode(ANSWER).unwrap().len(), "{act:?}");
        assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 3, "{act:?}");
        let calls: usize = fleet.workers.iter().map(|worker| worker.calls.load(Ordering::SeqCst)).sum();
        assert!(calls >= 2, "{act:?}: {calls} calls");
    }
}

/// The cut may fall anywhere: inside a character of several tokens, inside a stop text, before the last token
/// that is allowed. Every position is cut, and what is shown must be what an undisturbed worker gives.
#[tokio::test]
async fn every_cut_gives_the_same_answer() {
    let mut fleet = Fleet::start(&[(Decode, &[]), (Decode, &[])], &["--temperature", "0"]).await;
    let tokens = fleet.tokenizer.encode(ANSWER).unwrap().len();
    let cases = [json!({}), json!({"stop": [" jumps END"]}), json!({"max_tokens": tokens - 6})];
    for extra in &cases {
        let (_, whole) = fleet.ask(extra).await;
        for at in 0..=tokens {
            for act in [Act::Leave(at), Act::Break(at), Act::EndEarly(at)] {
                fleet.renew();
                fleet.workers[0].plays(act);
                let (status, cut) = fleet.ask(extra).await;
                let found = (status, &cut["choices"], &cut["usage"]);
                assert_eq!(found, (200, &whole["choices"], &whole["usage"]), "{act:?}");
                assert!(!fleet.workers[0].has_acts(), "nothing was cut");
            }
        }
    }
}

/// A worker can hang with its connection alive. After the allowed silence another one goes on, in the middle
/// of an answer as before its first word, and no token is lost; a hanging prefill costs only time.
#[tokio::test]
async fn silence_of_a_worker_ends() {
    for count in [0, 5] {
        let acts = [Act::Hang(count)];
        let fleet = Fleet::start(&[(Decode, &acts), (Decode, &acts)], &["--stall-ms", "200"]).await;
        let (status, body) = fleet.ask(&json!({})).await;
        assert_eq!((status, &body["choices"][0]["text"]), (200, &json!(ANSWER)), "{count}");
        let calls: usize = fleet.workers.iter().map(|worker| worker.calls.load(Ordering::SeqCst)).sum();
        assert!(calls >= 2, "{count}: {calls} calls");
    }
    let extra = json!({"prompt": "word ".repeat(60)});
    let fleet = Fleet::start(&[(Prefill, &[Act::Hang(0); 9]), (Decode, &[])], &["--stall-ms", "200"]).await;
    let (status, body) = fleet.ask(&extra).await;
    assert_eq!((status, &body["choices"][0]["text"]), (200, &json!(ANSWER)));
}

/// A worker that drains gives its requests back; that is no failure, so that it must not count as an attempt,
/// and nothing new may go to it.
#[tokio::test]
async fn draining_workers_are_left() {
    let acts = [Act::Leave(4); 50];
    let scripts = [(Decode, acts.as_slice()), (Decode, acts.as_slice()), (Decode, &[])];
    let fleet = Fleet::start(&scripts, &["--attempts-max", "1"]).await;
    for _ in 0..6 {
        let (status, body) = fleet.ask(&json!({})).await;
        assert_eq!((status, &body["choices"][0]["text"]), (200, &json!(ANSWER)), "{body}");
    }
    let calls: Vec<usize> = fleet.workers.iter().map(|worker| worker.calls.load(Ordering::SeqCst)).collect();
    assert!(calls[0] <= 1 && calls[1] <= 1 && calls[2] == 6, "{calls:?}");
}

/// A request that kills each worker it meets must not go round for ever, and must not be a 500.
#[tokio::test]
async fn attempts_are_bounded() {
    let acts = [Act::Break(0); 20];
    let scripts = [(Decode, acts.as_slice()); 3];
    let fleet = Fleet::start(&scripts, &["--attempts-max", "3"]).await;
    let (status, body) = fleet.ask(&json!({})).await;
    assert_eq!((status, &body["error"]["code"]), (502, &json!("worker_failed")), "{body}");
    let calls: usize = fleet.workers.iter().map(|worker| worker.calls.load(Ordering::SeqCst)).sum();
    assert_eq!(calls, 3);
}

/// A long prompt goes through the prefill worker; when that fails, decode computes the prompt itself.
/// What the separate prefill computed for this very request must not be sold as cached.
#[tokio::test]
async fn prefill_workers_help_but_are_not_needed() {
    let extra = json!({"prompt": "word ".repeat(60)});
    let fleet = Fleet::start(&[(Prefill, &[]), (Decode, &[])], &[]).await;
    let (_, body) = fleet.ask(&extra).await;
    assert_eq!(body["choices"][0]["text"], ANSWER);
    assert_eq!(body["usage"]["prompt_tokens_details"]["cached_tokens"], 16);
    let prompt = fleet.workers[1].prompts.lock().unwrap()[0].clone();
    assert_eq!(prompt.prefilled_tokens as usize, prompt.tokens.len() - 16);
    let short = fleet.ask(&json!({})).await.1;
    assert_eq!(short["usage"]["prompt_tokens_details"]["cached_tokens"], 3);
    assert_eq!(fleet.workers[0].calls.load(Ordering::SeqCst), 1);
    for act in [Act::Break(0), Act::Full] {
        let fleet = Fleet::start(&[(Prefill, &[act; 9]), (Decode, &[])], &[]).await;
        let (status, body) = fleet.ask(&extra).await;
        assert_eq!((status, &body["choices"][0]["text"]), (200, &json!(ANSWER)), "{act:?}");
        assert_eq!(body["usage"]["prompt_tokens_details"]["cached_tokens"], 3);
        assert!(fleet.workers[0].calls.load(Ordering::SeqCst) >= 1, "{act:?}");
    }
}

/// Without a worker the answer is 503 and says so; a full one is waited for.
#[tokio::test]
async fn missing_workers_are_told_and_full_ones_waited_for() {
    let fleet = Fleet::start(&[(Prefill, &[])], &["--worker-wait-ms", "100"]).await;
    let (status, headers, body) = fleet.post("/v1/completions", question(&json!({}))).await;
    assert_eq!(status, 503, "{body}");
    assert!(body.contains("no decode worker is left") && headers.contains_key("retry-after"), "{body}");
    let fleet = Fleet::start(&[(Decode, &[Act::Full; 3])], &[]).await;
    let (status, body) = fleet.ask(&json!({})).await;
    assert_eq!((status, &body["choices"][0]["text"]), (200, &json!(ANSWER)));
    assert_eq!(fleet.workers[0].calls.load(Ordering::SeqCst), 4);
}

/// What the worker refuses is the caller's fault, with the worker's words; trying another worker would
/// only repeat it.
#[tokio::test]
async fn refusals_of_the_worker_reach_the_caller() {
    let fleet = Fleet::start(&[(Decode, &[Act::Refuse]), (Decode, &[Act::Refuse])], &[]).await;
    let (status, body) = fleet.ask(&json!({"stream": true})).await;
    assert_eq!((status, &body["error"]["type"]), (400, &json!("invalid_request_error")));
    assert_eq!(body["error"]["message"], "this prompt is refused");
    let calls: usize = fleet.workers.iter().map(|worker| worker.calls.load(Ordering::SeqCst)).sum();
    assert_eq!(calls, 1);
}

/// A client that goes away in mid-stream must end the worker's stream, which gives back its leases; the
/// same for a client that waits for a whole answer.
#[tokio::test]
async fn a_client_that_goes_away_ends_the_worker_call() {
    for stream in [true, false] {
        let fleet = Fleet::start(&[(Decode, &[Act::Hang(5)])], &[]).await;
        let sent = fleet.send("/v1/completions", question(&json!({"stream": stream})));
        if stream {
            let mut response = sent.await;
            assert!(response.chunk().await.unwrap().is_some());
            drop(response);
        } else {
            let calls = &fleet.workers[0].calls;
            tokio::select! {
                _ = sent => panic!("an answer that hangs came"),
                () = until("the worker was called", || calls.load(Ordering::SeqCst) == 1) => {}
            }
        }
        tokio::time::timeout(DEADLINE, fleet.workers[0].dropped.notified()).await.unwrap();
        until("its place is free again", || fleet.router.metrics.in_progress.get() == 0).await;
    }
}

/// More requests than allowed must be turned away at once with a time to come back, not piled up.
#[tokio::test]
async fn a_full_router_says_when_to_come_back() {
    let fleet = Fleet::start(&[(Decode, &[Act::Hang(1)])], &["--requests-max", "1"]).await;
    let mut first = fleet.send("/v1/completions", question(&json!({"stream": true}))).await;
    first.chunk().await.unwrap();
    let (status, headers, body) = fleet.post("/v1/completions", question(&json!({}))).await;
    assert_eq!((status, headers["retry-after"].to_str().unwrap()), (429, "1"), "{body}");
    assert!(body.contains("rate_limit_error"), "{body}");
    // The worker has two places, both taken: the third waits in a queue of one, the fourth is too many.
    let hangs = [Act::Hang(1), Act::Hang(1)];
    let fleet = Fleet::start(&[(Decode, &hangs)], &["--queue-max", "1"]).await;
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut response = fleet.send("/v1/completions", question(&json!({"stream": true}))).await;
        response.chunk().await.unwrap();
        held.push(response);
    }
    let plain = json!({});
    let third = fleet.ask(&plain);
    let fourth = async {
        until("the third waits", || fleet.router.metrics.waiting.get() == 1).await;
        let refused = fleet.ask(&json!({})).await;
        held.clear();
        refused
    };
    let ((third, _), (fourth, body)) = tokio::join!(third, fourth);
    assert_eq!((third, fourth), (200, 429), "{body}");
}

/// A request that would get its first token too late must be told at once and cost no worker anything; one
/// that would be in time is served. The worker computes 1,000 tokens a second.
#[tokio::test]
async fn requests_that_would_be_late_are_refused() {
    let fleet = Fleet::start(&[(Decode, &[])], &["--first-token-seconds-max", "0.1"]).await;
    let long = question(&json!({"prompt": "word ".repeat(90)}));
    let (status, headers, body) = fleet.post("/v1/completions", long.clone()).await;
    assert_eq!((status, headers["retry-after"].to_str().unwrap()), (429, "1"), "{body}");
    assert!(body.contains("deadline_exceeded") && body.contains("wanted within 0.1 s"), "{body}");
    assert_eq!(fleet.workers[0].calls.load(Ordering::SeqCst), 0);
    assert_eq!(fleet.ask(&json!({})).await.0, 200);
    let client = reqwest::Client::builder().no_proxy().timeout(DEADLINE).build().unwrap();
    let url = format!("{}/v1/completions", fleet.url);
    for (wanted, expected) in [("60000", 200), ("1", 429), ("soon", 400), ("0", 400)] {
        let request = client.post(&url).header("x-first-token-ms", wanted).body(long.clone());
        assert_eq!(request.send().await.unwrap().status().as_u16(), expected, "{wanted}");
    }
    assert_eq!(fleet.router.metrics.waiting.get(), 0);
}

/// What the router would do must be what it then does, with every term shown and nothing started.
#[tokio::test]
async fn placement_is_explained() {
    let fleet = Fleet::start(&[(Decode, &[]), (Decode, &[]), (Prefill, &[])], &[]).await;
    let prompt = json!({"prompt": "word ".repeat(60)});
    let (status, _, body) = fleet.post("/admin/explain", question(&prompt)).await;
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((status, &body["ways_in_all"]), (200, &json!(4)), "{body}");
    let ways = body["ways"].as_array().unwrap();
    let cost = |way: &Value| way["cost_seconds"].as_f64().unwrap();
    assert!(ways.windows(2).all(|pair| cost(&pair[0]) <= cost(&pair[1])), "{body}");
    for way in ways {
        let terms = ["queue_seconds", "load_seconds", "prefill_seconds", "handover_seconds", "harm_seconds"];
        let sum: f64 = terms.iter().map(|term| way[*term].as_f64().unwrap()).sum();
        assert!((sum - cost(way)).abs() < 1e-9, "{way}");
        assert_eq!(way["missing_tokens"], body["prompt_tokens"], "{way}");
    }
    assert_eq!(ways[0]["prefill"], "worker-2");
    let calls = || fleet.workers.iter().map(|worker| worker.calls.load(Ordering::SeqCst)).collect::<Vec<_>>();
    assert_eq!(calls(), [0, 0, 0]);
    fleet.ask(&prompt).await;
    assert_eq!(calls()[2], 1);
    let (status, _, body) = fleet.post("/admin/explain", question(&json!({"model": "gpt-9"}))).await;
    assert_eq!(status, 404, "{body}");
    let chat = json!({"messages": [{"role": "user", "content": "say it?"}]});
    assert_eq!(fleet.post("/admin/explain", chat.to_string()).await.0, 200);
    // A listener that does not say who calls must be taken for one that anybody reaches.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let app = terrace_router::http::routes(std::sync::Arc::clone(&fleet.router));
    tokio::spawn(async move { axum::serve(listener, app).await });
    let client = reqwest::Client::builder().no_proxy().timeout(DEADLINE).build().unwrap();
    let sent = client.post(format!("{url}/admin/explain")).body(question(&prompt)).send().await;
    assert_eq!(sent.unwrap().status().as_u16(), 403);
}

/// An answer that takes too long ends with a clear error, before and after its first token.
#[tokio::test]
async fn requests_have_a_deadline() {
    let acts = [Act::Hang(0), Act::Hang(3)];
    let fleet = Fleet::start(&[(Decode, &acts)], &["--request-seconds-max", "1"]).await;
    let (status, body) = fleet.ask(&json!({})).await;
    assert_eq!((status, &body["error"]["code"]), (504, &json!("timeout")));
    let (status, _, body) = fleet.post("/v1/completions", question(&json!({"stream": true}))).await;
    assert_eq!(status, 200);
    assert!(body.contains("\"error\"") && !body.contains("[DONE]"), "{body}");
}

/// Everything a caller can get wrong must be answered in OpenAI's shape with the right status and no 500.
#[tokio::test]
async fn bad_requests_have_their_own_status() {
    let fleet = Fleet::start(&[(Decode, &[])], &["--body-bytes-max", "20000"]).await;
    let long = json!({"prompt": "x ".repeat(3000)});
    let cases = [
        ("/v1/completions", "{\"prompt\": ".to_owned(), 400, "not valid JSON"),
        ("/v1/completions", question(&long), 400, "context is 512 tokens"),
        ("/v1/completions", question(&json!({"prompt": ""})), 400, "the prompt is empty"),
        ("/v1/completions", question(&json!({"prompt": [999_999]})), 400, "out of range"),
        ("/v1/completions", question(&json!({"n": 2})), 400, "`n` is not supported"),
        ("/v1/completions", question(&json!({"model": "gpt-9"})), 404, "`gpt-9` does not exist"),
        ("/v1/completions", question(&json!({"prompt": "y".repeat(100_000)})), 413, "20000 bytes"),
        ("/v1/embeddings", "{}".to_owned(), 404, "no POST /v1/embeddings"),
        ("/v1/models", "{}".to_owned(), 405, "does not take POST"),
    ];
    for (route, body, expected, word) in cases {
        let (status, headers, text) = fleet.post(route, body).await;
        let body: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(status, expected, "{route}: {text}");
        assert!(body["error"]["message"].as_str().unwrap().contains(word), "{route}: {text}");
        assert!(body["error"]["type"].is_string() && headers.contains_key("x-request-id"), "{text}");
    }
    assert_eq!(fleet.workers[0].calls.load(Ordering::SeqCst), 0);
    let (status, body) = fleet.ask(&json!({"model": "tiny-test"})).await;
    assert_eq!((status, &body["model"]), (200, &json!("tiny-test")));
}

/// Ten million tokens could be hashed, looked up and placed before anybody asks how many there are, or none be taken for
/// a prompt that is cached whole: refused with the limit, where the body is too long and where only the prompt is.
#[tokio::test]
async fn a_prompt_of_ten_million_tokens_or_none_is_refused() {
    let million = "1,".repeat(10_000_000);
    let long = format!("{{\"model\": \"tiny-test\", \"prompt\": [{}1]}}", million);
    let none = json!({"model": "tiny-test", "prompt": []}).to_string();
    let small = Fleet::start(&[(Decode, &[])], &[]).await;
    let large = Fleet::start(&[(Decode, &[])], &["--body-bytes-max", "67108864"]).await;
    let cases = [
        (&small, &long, 413, "4194304 bytes, which is the limit"),
        (&large, &long, 400, "context is 512 tokens"),
        (&large, &none, 400, "empty"),
    ];
    for (fleet, body, expected, word) in cases {
        let began = std::time::Instant::now();
        let (status, _, text) = fleet.post("/v1/completions", body.clone()).await;
        assert_eq!(status, expected, "{text}");
        let body: Value = serde_json::from_str(&text).unwrap();
        assert!(body["error"]["message"].as_str().unwrap().contains(word), "{text}");
        assert!(
            text.len() < 1000 && began.elapsed() < DEADLINE,
            "{} bytes, {:?}",
            text.len(),
            began.elapsed()
        );
        assert_eq!(fleet.workers[0].calls.load(Ordering::SeqCst), 0);
        assert_eq!(fleet.ask(&json!({})).await.0, 200, "the router goes on");
        fleet.workers[0].calls.store(0, Ordering::SeqCst);
    }
}

/// The pages that tools and operators read, with the id that a caller chose.
#[tokio::test]
async fn pages_can_be_read() {
    let fleet = Fleet::start(&[(Decode, &[])], &[]).await;
    fleet.ask(&json!({})).await;
    let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(10)).build().unwrap();
    let page = async |path: &str| {
        let request = client.get(format!("{}{path}", fleet.url)).header("x-request-id", "mine-7");
        let response = request.send().await.unwrap();
        assert_eq!(response.headers()["x-request-id"], "mine-7");
        (response.status().as_u16(), response.text().await.unwrap())
    };
    let (_, models) = page("/v1/models").await;
    let models: Value = serde_json::from_str(&models).unwrap();
    assert_eq!((&models["object"], &models["data"][0]["id"]), (&json!("list"), &json!("tiny-test")));
    assert_eq!(page("/v1/models/tiny-test").await.0, 200);
    assert_eq!(page("/v1/models/other").await.0, 404);
    assert_eq!(page("/healthz").await.0, 200);
    let (_, metrics) = page("/metrics").await;
    let line = "terrace_router_requests_total{route=\"/v1/completions\",status=\"200\"} 1";
    assert!(metrics.contains(line), "{metrics}");
    let report = fleet.router.pressure.report("r", std::time::Instant::now());
    assert_eq!((report.finished_requests, report.cached_tokens), (1, 3));
}
