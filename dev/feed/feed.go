// Package feed makes events as the change-data-capture service in front of the stream publishes them: rows of chats,
// messages, contacts and agents, some 600 bytes each.
package feed

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"time"
)

// Event is one change.
type Event struct {
	Subject string // without the prefix and its dot
	Payload []byte
}

// Row is the payload of an event. EventTime has nanoseconds, so that a reader on the same machine can tell the latency.
type Row struct {
	EventID   string         `json:"event_id"`
	CompanyID string         `json:"company_id"`
	AgentID   string         `json:"agent_id"`
	ChatID    string         `json:"chat_id,omitempty"`
	MessageID string         `json:"message_id,omitempty"`
	EventTime time.Time      `json:"event_time"`
	EventType string         `json:"event_type"`
	RowData   map[string]any `json:"row_data"`
}

var names = []string{"Ayu Lestari", "Budi Santoso", "Citra Dewi", "Dimas Pratama", "Eka Putri", "Fajar Nugroho",
	"Gita Permata", "Hendra Wijaya", "Intan Sari", "Joko Susilo", "Kartika Ayu", "Lukman Hakim"}

var texts = []string{
	"Good morning, is the blue one still in stock? I would like to pick it up today if that works for you.",
	"Thank you, I have just sent the transfer. Could you check and confirm the order, please?",
	"The parcel arrived but the box is damaged 📦, what do I have to do now?",
	"Can you deliver to Jalan Merdeka 17 on Saturday before noon?",
	"I need an invoice in the name of our company, with the tax number that I sent last week.",
	"Sounds good 👍 see you at three.",
	"We have it in red, green and \"midnight\" blue; the last one ships on Monday.",
}

// Name is the contact's name behind a chat, always the same for one id.
func Name(chat string) string {
	sum := 0
	for _, b := range []byte(chat) {
		sum += int(b)
	}
	return names[sum%len(names)]
}

// Text is something that people write.
func Text() string { return texts[rand.IntN(len(texts))] }

// Chat is a change of a chat's row: its last message and its number of unread ones.
func Chat(company, agent, chat, text string, unread int) Event {
	now := time.Now()
	return build(Row{CompanyID: company, AgentID: agent, ChatID: chat, EventType: "chats", EventTime: now, RowData: map[string]any{
		"id": chat, "company_id": company, "agent_id": agent, "push_name": Name(chat), "custom_name": nil, "is_group": false,
		"group_name": "", "phone_number": "62812" + digits(8), "unread_count": unread, "conversation_timestamp": now.Unix(),
		"last_message": map[string]any{"text": text, "from_me": unread == 0, "type": "conversation"}, "not_spam": true,
		"assigned_to": agent, "labels": []string{"sales", "follow-up"}, "created_at": now.Add(-90 * 24 * time.Hour), "updated_at": now,
	}}, "chats")
}

// Message is a new row of messages.
func Message(company, agent, chat, text string, fromMe bool) Event {
	now, id := time.Now(), fmt.Sprintf("3EB0%012X", rand.Uint64()>>16)
	return build(Row{CompanyID: company, AgentID: agent, ChatID: chat, MessageID: id, EventType: "messages", EventTime: now, RowData: map[string]any{
		"id": rand.Int64N(1 << 40), "message_id": id, "chat_id": chat, "company_id": company, "agent_id": agent,
		"jid": "62812" + digits(8) + "@s.whatsapp.net", "flow": map[bool]string{true: "OUT", false: "IN"}[fromMe],
		"message_type": "conversation", "message_obj": map[string]any{"conversation": text}, "status": "delivered",
		"message_timestamp": now.Unix(), "is_deleted": false, "edited_message_obj": nil, "created_at": now, "updated_at": now,
	}}, "messages."+chat)
}

// Contact is a change of a contact's row.
func Contact(company, agent, contact string) Event {
	now := time.Now()
	return build(Row{CompanyID: company, AgentID: agent, EventType: "contacts", EventTime: now, RowData: map[string]any{
		"id": contact, "company_id": company, "agent_id": agent, "push_name": Name(contact), "phone_number": "62812" + digits(8),
		"custom_name": nil, "type": "customer", "origin": "organic", "assigned_to": agent, "tags": []string{"vip", "jakarta"},
		"gender": nil, "birthday": nil, "notes": "Prefers to be called in the afternoon; asked twice for the wholesale price list.",
		"avatar": "https://cdn.example.com/avatars/" + digits(24) + ".jpg", "first_message_id": digits(16), "created_at": now, "updated_at": now,
	}}, "contacts")
}

// Agent is a change of an agent's row.
func Agent(company, agent, status string) Event {
	now := time.Now()
	return build(Row{CompanyID: company, AgentID: agent, EventType: "agents", EventTime: now, RowData: map[string]any{
		"id": agent, "agent_id": agent, "company_id": company, "agent_name": "Desk " + agent, "status": status, "host_name": "wa-" + digits(4),
		"phone_number": "62812" + digits(8), "qr_code": nil, "version": "2.14.1", "last_seen": now, "created_at": now, "updated_at": now,
	}}, "agents")
}

// build completes row and encodes it. Marshalling these types cannot fail.
func build(row Row, table string) Event {
	row.EventID = fmt.Sprintf("%016x%016x", rand.Uint64(), rand.Uint64())
	payload, _ := json.Marshal(row)
	return Event{Subject: row.CompanyID + "." + row.AgentID + "." + table, Payload: payload}
}

func digits(n int) string {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte('0' + rand.IntN(10))
	}
	return string(b)
}
