//! `terrace up` and the admin commands, with everything real.

#![allow(
    clippy::unwrap_used,
    reason = "a test fails by panicking; the lint's exception covers test functions only"
)]

use std::fmt::Write;
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use terrace_tests::node::{Node, alive, kill, model, terrace, wait_until};

/// A prompt of some 200 tokens.
fn long_prompt() -> String {
    (0..20).fold(String::new(), |mut text, number| {
        write!(text, "Harbour {number} lies {number} miles north of the old lighthouse. ").unwrap();
        text
    })
}

async fn ask(url: &str, prompt: &str) -> Result<Value, String> {
    let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(60)).build().unwrap();
    let body = json!({ "prompt": prompt, "max_tokens": 8, "temperature": 0 });
    let answer = client.post(format!("{url}/v1/completions")).json(&body).send().await;
    let answer = answer.map_err(|error| error.to_string())?;
    let status = answer.status();
    let text = answer.text().await.map_err(|error| error.to_string())?;
    if status.is_success() {
        Ok(serde_json::from_str(&text).unwrap())
    } else {
        Err(format!("{status}: {text}"))
    }
}

async fn page(url: &str) -> String {
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    client.get(url).send().await.unwrap().error_for_status().unwrap().text().await.unwrap()
}

fn promtool(text: &str) {
    let child = Command::new("promtool").args(["check", "metrics"]).stdin(Stdio::piped()).spawn();
    let Ok(mut child) = child else {
        eprintln!("SKIPPED: promtool is not there; `make test` installs it");
        return;
    };
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), text.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "promtool does not like:\n{text}");
}

/// A second server on the port would make the front door fail late and dimly:
/// it must be refused by number before anything starts.
#[test]
fn a_port_in_use_is_refused_before_anything_starts() {
    let user = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = user.local_addr().unwrap().port().to_string();
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("home");
    let output = terrace(&["up", "--port", &port]).arg("--home").arg(&home).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(errors.contains(&format!("port {port} is in use")), "{errors}");
    assert!(!home.exists(), "something was started");
}

/// Admin commands without a daemon must say what to do, in one line, with exit code 1.
#[test]
fn admin_commands_without_a_daemon_say_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let output = terrace(&["info", "--home"]).arg(dir.path()).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), errors.trim_end().lines().count()), (Some(1), 1), "{errors}");
    assert!(errors.contains("terrace up"), "{errors}");
    let output = terrace(&["info", "--endpoint", "http://127.0.0.1:9"]).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("no daemon answers"));
    assert_eq!(terrace(&["block", "stat", "xyz"]).output().unwrap().status.code(), Some(2));
}

/// A file that is no model must end the start with its reason, not with a
/// planner that starts workers for ever behind a silent screen.
#[test]
fn a_file_that_is_no_model_ends_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("no.gguf");
    std::fs::write(&file, "this is no model").unwrap();
    let mut command = terrace(&["up", "--port", "0", "--pinned-bytes", "256MiB", "--nvme-bytes", "256MiB"]);
    let output =
        command.arg("--home").arg(dir.path().join("home")).arg("--model").arg(&file).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("no.gguf") && said.contains("GGUF"), "{said}");
}

/// The whole story of one node: it answers, the second time from the cache; the
/// admin commands show that; every metrics page is sound; a second `up` on the
/// same home is refused; Ctrl-C ends everything cleanly.
#[tokio::test]
async fn a_node_answers_shows_itself_and_stops_cleanly() {
    let Some(model) = model() else { return };
    let mut node = Node::start(&model, &[]);
    let prompt = long_prompt();
    let first = ask(&node.url, &prompt).await.unwrap();
    let second = ask(&node.url, &prompt).await.unwrap();
    assert_eq!(first["choices"][0]["text"], second["choices"][0]["text"]);
    let cached = second["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert!(cached >= 160, "{second}");

    let info = node.admin_json(&["info"]);
    assert!(
        info["tiers"].as_array().unwrap().iter().any(|tier| tier["tier"] == "Pinned" && tier["on"] == true)
    );
    assert_eq!(node.admin_json(&["flush"])["failed"], 0);
    let file = node.home.join("prompt.txt");
    std::fs::write(&file, &prompt).unwrap();
    let found = node.admin_json(&["prefix", "match", "--prompt-file", file.to_str().unwrap()]);
    assert!(found["cached_tokens"].as_u64().unwrap() >= cached, "{found}");
    let explain = ["route", "explain", "--prompt-file", file.to_str().unwrap()];
    let explained = node.admin_json(&explain);
    assert!(explained["ways"][0]["loaded_tokens"].as_u64().unwrap() > 0, "{explained}");
    let block = found["blocks"][0]["block_id"].as_str().unwrap();
    assert_eq!(node.admin_json(&["block", "verify", block])["ok"], true);
    assert_eq!(node.admin_json(&["block", "stat", block])["block_id"], block);
    assert!(!node.admin_json(&["block", "locate", block]).as_array().unwrap().is_empty());
    wait_until(|| node.admin_json(&["lease", "ls"])["total"] == 0, "the end of all leases");
    assert_eq!(node.admin_json(&["space", "ls"]).as_array().unwrap().len(), 1);
    for command in [
        &["info"][..],
        &["tier", "ls"],
        &["space", "ls"],
        &["lease", "ls"],
        &["block", "stat", block],
        &explain,
    ] {
        let output = node.admin(command);
        assert!(output.status.success());
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(!text.trim().is_empty());
    }

    let running = node.running();
    promtool(&page(&format!("{}/metrics", node.url)).await);
    promtool(&page(running["daemon_metrics"].as_str().unwrap()).await);
    promtool(&page(running["planner_metrics"].as_str().unwrap()).await);

    let output = terrace(&["up", "--port", "0", "--home"]).arg(&node.home).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains(&format!("pid {}", node.pid())), "{errors}");

    let children = node.children();
    assert_eq!(children.len(), 5, "{children:?}");
    let began = Instant::now();
    kill(node.pid(), "-INT");
    assert_eq!(node.wait(), Some(0));
    assert!(began.elapsed() < Duration::from_secs(15), "stopping took {:?}", began.elapsed());
    assert!(!children.iter().any(|(pid, _)| alive(*pid)));
}

/// kill -9 of `terrace up` alone could leave daemons behind that hold the home:
/// all must die with it, and the next `up` must find everything on disk.
#[tokio::test]
async fn children_die_with_a_killed_up_and_the_cache_survives() {
    let Some(model) = model() else { return };
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("home");
    let mut node = Node::start_in(&home, &model, &[]);
    let prompt = long_prompt();
    let first = ask(&node.url, &prompt).await.unwrap();
    assert_eq!(node.admin_json(&["flush"])["failed"], 0);
    let children = node.children();
    kill(node.pid(), "-KILL");
    node.wait();
    wait_until(|| !children.iter().any(|(pid, _)| alive(*pid)), "the death of the children");
    let node = Node::start_in(&home, &model, &[]);
    let second = ask(&node.url, &prompt).await.unwrap();
    assert_eq!(first["choices"][0]["text"], second["choices"][0]["text"]);
    assert!(second["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() >= 160, "{second}");
}

/// Each process killed alone must come back, and requests must go on; while the
/// daemon is away, answers must not change.
#[tokio::test]
async fn a_killed_process_comes_back_and_requests_go_on() {
    let Some(model) = model() else { return };
    let node = Node::start(&model, &[]);
    let prompt = long_prompt();
    let first = ask(&node.url, &prompt).await.unwrap();
    for program in ["terraced", "terrace-planner", "terrace-router", "terrace-worker"] {
        let pid = node.child(program);
        kill(pid, "-KILL");
        wait_until(|| !alive(pid), program);
        let began = Instant::now();
        loop {
            match ask(&node.url, &prompt).await {
                Ok(answer) => {
                    assert_eq!(answer["choices"][0]["text"], first["choices"][0]["text"], "{program}");
                    break;
                }
                Err(error) => assert!(began.elapsed() < Duration::from_secs(60), "{program}: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        wait_until(|| node.children().iter().any(|(other, name)| *other != pid && name == program), program);
    }
}
