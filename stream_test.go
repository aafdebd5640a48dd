package main

import (
	"strings"
	"testing"

	"github.com/nats-io/nats.go/jetstream"
)

func TestHoldsPrefix(t *testing.T) {
	transform := func(src, dest string) jetstream.SubjectTransformConfig {
		return jetstream.SubjectTransformConfig{Source: src, Destination: dest}
	}
	subjects := func(s ...string) jetstream.StreamConfig { return jetstream.StreamConfig{Name: "s", Subjects: s} }
	mapped := func(src, dest string, s ...string) jetstream.StreamConfig {
		cfg, t := subjects(s...), transform(src, dest)
		cfg.SubjectTransform = &t
		return cfg
	}
	sourced := func(source jetstream.StreamSource, s ...string) jetstream.StreamConfig {
		cfg := subjects(s...)
		cfg.Sources = []*jetstream.StreamSource{{Name: "other", FilterSubject: "x"}, &source}
		return cfg
	}
	for _, c := range []struct {
		cfg    jetstream.StreamConfig
		prefix string
		says   string // "" = an event may be in it
	}{
		{subjects("wa.>"), "wa", ""},
		{subjects(">"), "wa", ""},
		{subjects("*.>"), "wa", ""},
		{subjects("orders.>", "wa.>"), "wa", ""},
		{subjects("wa.*.*.chats"), "wa", ""},
		{subjects("wa.acme.>"), "wa", ""},
		{subjects("wa.acme.7.messages.c1.x"), "wa", ""},
		{subjects("wa.>"), "wa.eu", ""}, // may be in it: companies of two tokens are none, but the stream does not know that
		{subjects("websocket.>"), "wa", `stores only "websocket.>", which no event under NATS_SUBJECT_PREFIX "wa" matches: set NATS_SUBJECT_PREFIX=websocket, or have its owner add "wa.>" to its subjects`},
		{subjects("orders", "websocket.*.*.chats", "a.b.>"), "wa", `stores only "orders", "websocket.*.*.chats", "a.b.>", which no event under NATS_SUBJECT_PREFIX "wa" matches: set NATS_SUBJECT_PREFIX=websocket, or`},
		{subjects("a.b.>"), "wa", "set NATS_SUBJECT_PREFIX=a.b, or"},
		{subjects("wa.eu.>"), "wa.us", "set NATS_SUBJECT_PREFIX=wa.eu, or"},
		{subjects("wa.*"), "wa", `"wa" matches: have its owner`},
		{subjects("wa.*.*.presence"), "wa", `matches: have its owner`},
		{subjects("*.*.x.y"), "wa", "matches: have its owner"}, // no prefix could be set for that

		{mapped("raw.>", "wa.>", "raw.>"), "wa", ""},
		{mapped("raw.*.*.>", "wa.{{wildcard(1)}}.$2.>", "raw.>"), "wa", ""},
		{mapped("", "wa.>", "raw.>"), "wa", ""},
		{mapped("wa.one.>", "raw.>", "wa.>"), "wa", ""}, // other companies are stored as they are
		{mapped("wa.>", "websocket.>", "wa.>"), "wa", `stores only "websocket.>"`},
		{mapped(">", "{{wildcard(1)}}.>", "raw.>"), "wa", ""}, // maybe
		{mapped("other.>", "wa.>", "raw.>"), "wa", `stores only "raw.>"`},

		{sourced(jetstream.StreamSource{Name: "o"}), "wa", ""},
		{sourced(jetstream.StreamSource{Name: "o", FilterSubject: "wa.>"}, "own.>"), "wa", ""},
		{sourced(jetstream.StreamSource{Name: "o", FilterSubject: "websocket.>"}), "wa", `stores only "x", "websocket.>"`},
		{sourced(jetstream.StreamSource{Name: "o", SubjectTransforms: []jetstream.SubjectTransformConfig{transform("websocket.>", "wa.>")}}), "wa", ""},
		{sourced(jetstream.StreamSource{Name: "o", SubjectTransforms: []jetstream.SubjectTransformConfig{transform("wa.>", "")}}), "wa", ""},
		{sourced(jetstream.StreamSource{Name: "o", SubjectTransforms: []jetstream.SubjectTransformConfig{transform("wa.>", "b.>")}}), "wa", `stores only "x", "b.>"`},
		{jetstream.StreamConfig{Mirror: &jetstream.StreamSource{Name: "o"}}, "wa", ""},
		{jetstream.StreamConfig{Mirror: &jetstream.StreamSource{Name: "o", FilterSubject: "b.>"}}, "wa", `stores only "b.>"`},
	} {
		err := holdsPrefix(c.cfg, c.prefix)
		switch {
		case c.says == "" && err != nil:
			t.Errorf("%+v with %q: %v", c.cfg, c.prefix, err)
		case c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)):
			t.Errorf("%+v with %q: got %v, want %s", c.cfg, c.prefix, err, c.says)
		}
	}
}
