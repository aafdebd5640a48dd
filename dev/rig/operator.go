package rig

import (
	"fmt"
	"os"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nkeys"
)

// Operator is a NATS operator with one account, whose users prove themselves by credentials files.
type Operator struct {
	Conf []string // lines of the server's configuration

	account    nkeys.KeyPair
	accountKey string
}

// NewOperator makes keys and tokens of operator, system account and account; the account may use JetStream.
func NewOperator() (*Operator, error) {
	operator, operatorKey, err := newKeys(nkeys.CreateOperator)
	if err != nil {
		return nil, err
	}
	o := &Operator{}
	if o.account, o.accountKey, err = newKeys(nkeys.CreateAccount); err != nil {
		return nil, err
	}
	_, systemKey, err := newKeys(nkeys.CreateAccount)
	if err != nil {
		return nil, err
	}
	account := jwt.NewAccountClaims(o.accountKey)
	account.Limits.MemoryStorage, account.Limits.DiskStorage = jwt.NoLimit, jwt.NoLimit
	var tokens []string
	for _, claims := range []jwt.Claims{jwt.NewOperatorClaims(operatorKey), account, jwt.NewAccountClaims(systemKey)} {
		token, err := claims.Encode(operator)
		if err != nil {
			return nil, fmt.Errorf("sign a NATS token: %w", err)
		}
		tokens = append(tokens, token)
	}
	o.Conf = []string{
		"operator: " + tokens[0], "system_account: " + systemKey, "resolver: MEMORY",
		fmt.Sprintf("resolver_preload { %s: %s, %s: %s }", o.accountKey, tokens[1], systemKey, tokens[2]),
	}
	return o, nil
}

func newKeys(create func() (nkeys.KeyPair, error)) (nkeys.KeyPair, string, error) {
	pair, err := create()
	if err != nil {
		return nil, "", err
	}
	public, err := pair.PublicKey()
	return pair, public, err
}

// WriteCredentials makes a user of the account and puts token and seed into file. Without subjects the user may do anything.
func (o *Operator) WriteCredentials(file string, publish, subscribe []string) error {
	user, userKey, err := newKeys(nkeys.CreateUser)
	if err != nil {
		return err
	}
	claims := jwt.NewUserClaims(userKey)
	claims.Pub.Allow, claims.Sub.Allow = publish, subscribe
	token, err := claims.Encode(o.account)
	if err != nil {
		return fmt.Errorf("sign a user's NATS token: %w", err)
	}
	seed, err := user.Seed()
	if err != nil {
		return err
	}
	text, err := jwt.FormatUserConfig(token, seed)
	if err != nil {
		return err
	}
	return os.WriteFile(file, text, 0o600)
}

// WriteNKey makes a user that proves itself by a key alone, puts its seed into file and returns its public key.
func WriteNKey(file string) (public string, err error) {
	user, public, err := newKeys(nkeys.CreateUser)
	if err != nil {
		return "", err
	}
	seed, err := user.Seed()
	if err != nil {
		return "", err
	}
	return public, os.WriteFile(file, seed, 0o600)
}
